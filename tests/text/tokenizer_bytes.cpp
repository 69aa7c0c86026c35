// SPDX-License-Identifier: MIT
// What a vocabulary cannot write, and files that ask for more than their size: text/tokenizer.hpp.
#include <algorithm>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>
#include <zamba/random.hpp>
#include <zamba/text/tokenizer.hpp>

#include "tests/support/temporary_folder.hpp"
#include "tests/support/tokenizer_lines.hpp"

namespace {

using nlohmann::json;
using zamba::Index;
using zamba::Token;
using zamba::Tokenizer;
using zamba::Unknown;
using Tokens = std::vector<Token>;

/// byte_level.json without the tokens in which any of these bytes occurs, and without a normalizer.
json without_bytes(std::string_view bytes) {
  json file = json::parse(zamba_test::read_text(zamba_test::tokenizer_data("byte_level.json")));
  file["normalizer"] = nullptr;
  const auto has_one = [&](const std::string& token) {
    const std::string text = zamba::detail::ByteAlphabet::get().read(token);
    return text.find_first_of(bytes) != text.npos;
  };
  json vocabulary = json::object(), merges = json::array();
  for (const auto& [token, id] : file["model"]["vocab"].items())
    if (!has_one(token)) vocabulary[token] = id;
  for (const json& merge : file["model"]["merges"]) {
    const std::string left = merge.is_string() ? merge.get<std::string>() : merge[0].get<std::string>();
    const std::string right = merge.is_string() ? "" : merge[1].get<std::string>();
    const std::size_t space = left.find(' ');
    if (!has_one(left.substr(0, space) + (merge.is_string() ? left.substr(space + 1) : right))) merges.push_back(merge);
  }
  file["model"]["vocab"] = vocabulary;
  file["model"]["merges"] = merges;
  return file;
}

/// The bytes that occur in no text of UTF-8, and that which is an e with an acute accent in Latin-1.
constexpr std::string_view lacking = "\xc0\xc1\xe9\xf5\xf6\xf7\xf8\xf9\xfa\xfb\xfc\xfd\xfe\xff";

std::string replaced(std::string_view text, std::string_view bytes, std::string_view by) {
  std::string result;
  for (const char byte : text)
    if (bytes.find(byte) == bytes.npos)
      result += byte;
    else
      result += by;
  return result;
}

std::string refusal(const Tokenizer& tokenizer, std::string_view text, Unknown unknown = Unknown::refuse) {
  try {
    tokenizer.encode(text, {.unknown = unknown});
  } catch (const zamba::Error& error) {
    return error.what();
  }
  return "no error";
}

/// A file of two letters, with these parts.
std::string small(const json& normalizer, const json& added = json::array(), const json& post_processor = nullptr,
                  const json& decoder = nullptr) {
  return json{
      {"added_tokens", added},
      {"normalizer", normalizer},
      {"post_processor", post_processor},
      {"decoder", decoder},
      {"model", {{"type", "BPE"}, {"unk_token", "a"}, {"vocab", {{"a", 0}, {"b", 1}}}, {"merges", json::array()}}}}
      .dump();
}

json replace(const std::string& from, const std::string& to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

json sequence(const char* parts, const json& step, int count) {
  json all = json::array();
  for (int i = 0; i < count; ++i) all.push_back(step);
  return {{"type", "Sequence"}, {parts, all}};
}

std::string parse_error(const std::string& file) {
  try {
    Tokenizer::parse(file, "the file");
  } catch (const zamba::Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_SUITE("text/tokenizer_bytes") {
  TEST_CASE("bytes without a token become U+FFFD, all others stay") {
    const auto tokenizer = Tokenizer::parse(without_bytes(lacking).dump());
    const auto whole = Tokenizer::parse(without_bytes("").dump());
    CHECK(tokenizer.decode(tokenizer.encode("caf\xe9 \xc0 la carte")) == "caf\ufffd \ufffd la carte");
    CHECK(tokenizer.encode("caf\xe9\xe9") == tokenizer.encode("caf\ufffd\ufffd"));
    zamba::Random random(zamba::Seed{6});
    int wrong = 0, lost = 0;
    for (int i = 0; i < 3'000; ++i) {
      std::string text;
      for (Index size = random.below(30); size > 0; --size)
        text.push_back(static_cast<char>(random.below(random.below(2) ? 256 : 128)));
      const std::string wanted = replaced(text, lacking, "\ufffd");
      lost += wanted != text;
      wrong += tokenizer.decode(tokenizer.encode(text)) != wanted;
      wrong += wanted == text && tokenizer.encode(text, {.unknown = Unknown::refuse}) != tokenizer.encode(text);
      wrong += whole.decode(whole.encode(text, {.unknown = Unknown::refuse})) != text;
    }
    CHECK(wrong == 0);
    CHECK(lost > 500);
  }

  TEST_CASE("what stands for them is unk_token, else U+FFFD, else '?'") {
    json file = without_bytes(std::string(lacking) + "\xef");
    CHECK(Tokenizer::parse(file.dump()).decode(Tokenizer::parse(file.dump()).encode("a\xe9 \ufffd")) == "a? ?\xbf\xbd");
    file["model"]["unk_token"] = "<|endoftext|>";
    const auto unk = Tokenizer::parse(file.dump());
    const Tokens tokens = unk.encode("a\xe9\xe9");
    CHECK(std::count(tokens.begin(), tokens.end(), *unk.unk()) == 2);
    CHECK(refusal(unk, "a\xe9\xe9") == "zamba: Tokenizer: no token for byte 0xE9 at offset 1 of the text");
    const auto none = Tokenizer::parse(without_bytes(std::string(lacking) + "\xef?").dump());
    CHECK(refusal(none, "a\xe9", Unknown::replace) ==
          "zamba: Tokenizer: no token for byte 0xE9 at offset 1 of the text");
    CHECK(none.decode(none.encode("ab")) == "ab");
  }

  TEST_CASE("a byte is refused by its value and its offset") {
    json file = without_bytes(lacking);
    CHECK(refusal(Tokenizer::parse(file.dump()), "na\xc3\xafve caf\xe9 \xff") ==
          "zamba: Tokenizer: no token for byte 0xE9 at offset 10 of the text");
    CHECK(refusal(Tokenizer::parse(file.dump()), "  \n<|endoftext|> \xff") ==
          "zamba: Tokenizer: no token for byte 0xFF at offset 17 of the text");
    file = without_bytes("\xc3");
    file["normalizer"] = {{"type", "NFC"}};
    CHECK(refusal(Tokenizer::parse(file.dump()), "e\u0301") ==
          "zamba: Tokenizer: no token for byte 0xC3 of the text as normalised");
    // Of a vocabulary of characters, all bytes of one.
    file = json::parse(small(nullptr));
    file["model"].erase("unk_token");
    CHECK(refusal(Tokenizer::parse(file.dump()), "ab\u8a9e\xe8") ==
          "zamba: Tokenizer: no token for bytes 0xE8 0xAA 0x9E at offset 2 of the text");
    CHECK(refusal(Tokenizer::parse(file.dump()), "ab\xe8") ==
          "zamba: Tokenizer: no token for byte 0xE8 at offset 2 of the text");
  }

  TEST_CASE("steps that multiply a text are refused before they have filled the memory") {
    const json ten = replace("a", "aaaaaaaaaa"), many = sequence("normalizers", ten, 10);
    CHECK(parse_error(small(many)) == "no error");
    const auto tokenizer = Tokenizer::parse(small(many), "the file");
    CHECK(tokenizer.encode("b") == Tokens{1});
    CHECK_THROWS_WITH_AS(tokenizer.encode("a"),
                         "zamba: the file: normalizer: would make more than 64 times as much of a text of 1 bytes",
                         zamba::Error);
    CHECK_THROWS_AS(tokenizer.encode(std::string(1'000'000, 'a')), zamba::Error);
    CHECK(Tokenizer::parse(small(ten)).encode("aab").size() == 21);
    const json added = {{{"id", 5}, {"content", "xa"}, {"normalized", true}}};
    CHECK(parse_error(small(many, added)).find("64 times as much of a text of 2 bytes") != std::string::npos);
    CHECK(parse_error(small(nullptr, json::array(), nullptr, sequence("decoders", ten, 10)))
              .find("decoder: would make more than 64 times as much of a text of 1 bytes") != std::string::npos);
    CHECK_THROWS_AS(Tokenizer::parse(small({{"type", "Prepend"}, {"prepend", std::string(1'000, 'b')}})).encode("a"),
                    zamba::Error);
    CHECK(parse_error(small(sequence("normalizers", ten, 65))) ==
          "zamba: the file: normalizer: at most 64 steps are supported, came 65");
    CHECK(parse_error(small(nullptr, json::array(), nullptr, sequence("decoders", ten, 65))) ==
          "zamba: the file: decoder: at most 64 steps are supported, came 65");
  }

  TEST_CASE("a template puts no more around a text than it can hold") {
    const auto file = [](int ids, int uses) {
      json special = {{"id", "x"}, {"ids", json::array()}}, single = {{{"Sequence", {{"id", "A"}}}}};
      for (int i = 0; i < ids; ++i) special["ids"].push_back(0);
      for (int i = 0; i < uses; ++i) single.push_back({{"SpecialToken", {{"id", "x"}}}});
      return small(nullptr, json::array(),
                   {{"type", "TemplateProcessing"}, {"single", single}, {"special_tokens", {{"x", special}}}});
    };
    CHECK(Tokenizer::parse(file(32, 32)).encode("b").size() == 1025);
    CHECK(parse_error(file(5'000, 5'000)) ==
          "zamba: the file: post_processor: at most 1024 tokens around a text are supported, came more");
  }

  TEST_CASE("long added tokens take no longer than short ones") {
    // A walk from every place would take hours here.
    const Index size = 1'000'000;
    json added = {{{"id", 5}, {"content", std::string(size, 'a') + "b"}},
                  {{"id", 6}, {"content", "b" + std::string(size, 'a')}},
                  {{"id", 7}, {"content", " "}, {"lstrip", true}, {"rstrip", true}}};
    const auto tokenizer = Tokenizer::parse(small(nullptr, added));
    const std::string letters(2 * size, 'a');
    CHECK(tokenizer.encode(letters).size() == letters.size());
    CHECK(tokenizer.encode(letters + "b").size() == letters.size() - static_cast<std::size_t>(size) + 1);
    CHECK(tokenizer.encode("b" + letters).front() == 6);
    CHECK(tokenizer.encode(std::string(size, ' ')).front() == 7);
  }

  TEST_CASE("paths that cannot be looked at are refused as those that cannot be opened") {
    const zamba_test::TemporaryFolder folder;
    std::filesystem::create_symlink(folder.path / "loop", folder.path / "loop");
    CHECK_THROWS_AS(Tokenizer::load(folder.path / "loop"), zamba::Error);
    CHECK_THROWS_AS(Tokenizer::load(std::string(300, 'x')), zamba::Error);
    CHECK_THROWS_AS(Tokenizer::load(folder.path), zamba::Error);
  }
}
