// SPDX-License-Identifier: MIT
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>
#include <zamba/random.hpp>
#include <zamba/testing/sanitized.hpp>
#include <zamba/text/text_stream.hpp>
#include <zamba/text/tokenizer.hpp>

#include "tests/support/temporary_folder.hpp"
#include "tests/support/tokenizer_lines.hpp"

namespace {

using nlohmann::json;
using zamba::Index;
using zamba::TextStream;
using zamba::Token;
using zamba::Tokenizer;
using zamba_test::tokenizer_data;
using zamba_test::tokenizer_ids;
using zamba_test::tokenizer_lines;
using Tokens = std::vector<Token>;

json file_of(const std::string& name) { return json::parse(zamba_test::read_text(tokenizer_data(name))); }

/// llama.json with Metaspace in place of its normalizer.
json metaspace(const char* scheme, bool split) {
  json file = file_of("llama.json");
  file["normalizer"] = nullptr;
  file["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", scheme}, {"split", split}};
  return file;
}

/// The variants of both files that tests/interop/tokenizer.py lists.
json variant(const std::string& name) {
  if (name == "first") return metaspace("first", false);
  if (name == "always") return metaspace("always", true);
  if (name == "never") return metaspace("never", false);
  if (name == "spaced" || name == "whole") {
    json file = file_of("byte_level.json");
    file["pre_tokenizer"][name == "spaced" ? "add_prefix_space" : "use_regex"] = name == "spaced";
    if (name == "spaced") file["normalizer"] = nullptr;
    return file;
  }
  json file =
      name == "metaspace_decoder" || name == "ignore_merges" ? metaspace("always", true) : file_of("llama.json");
  if (name == "metaspace_decoder") {
    file["decoder"] = file["pre_tokenizer"];
  } else if (name == "ignore_merges") {
    auto& merges = file["model"]["merges"];
    merges.erase(merges.begin() + 200, merges.end());
    file["model"]["ignore_merges"] = true;
  } else if (name == "template") {
    json around = file["post_processor"];
    around["single"].push_back(around["single"][0]);
    file["post_processor"] = {{"type", "Sequence"}, {"processors", {around, {{"type", "ByteLevel"}}}}};
  } else {
    file["model"]["byte_fallback"] = false;
    file["model"]["fuse_unk"] = name == "unk_fused";
  }
  return file;
}

/// How many of the lines get other tokens than the package `tokenizers` gave them.
std::size_t wrong_lines(const Tokenizer& tokenizer, const std::string& name, std::size_t least) {
  const auto lines = tokenizer_lines();
  const auto wanted = tokenizer_ids(name);
  REQUIRE(wanted.size() >= least);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) wrong += tokenizer.encode(lines[i]) != wanted[i];
  return wrong;
}

/// Whether a text comes back exactly: llama.json itself loses space marks, and spaces beside added tokens.
bool comes_back(const Tokenizer& tokenizer, const std::string& text) {
  const Tokens tokens = tokenizer.encode(text, {.add_special = false});
  const auto added = [&](Token id) { return id < 3 || id >= *tokenizer.id("<|left|>"); };
  return text.find("▁") == text.npos && std::none_of(tokens.begin(), tokens.end(), added);
}

std::string random_bytes(zamba::Random& random, Index size) {
  std::string text;
  for (Index i = 0; i < size; ++i) text.push_back(static_cast<char>(random.below(random.below(2) ? 256 : 128)));
  return text;
}

bool is_utf8(const std::string& text) {
  for (std::size_t at = 0; at < text.size(); at += zamba::detail::character_at(text, at).size)
    if (zamba::detail::character_at(text, at).code == zamba::detail::no_code) return false;
  return true;
}

/// Streams the tokens and compares: all of it is the whole text, and every push of a text in UTF-8 is, too.
bool streams(const Tokenizer& tokenizer, const Tokens& tokens, const std::string& text) {
  TextStream stream(tokenizer);
  std::string streamed;
  bool in_utf8 = true;
  for (const Token token : tokens) {
    const std::string pushed = stream.push(token);
    in_utf8 = in_utf8 && is_utf8(pushed);
    streamed += pushed;
  }
  if (is_utf8(text) && !in_utf8) return false;
  return streamed + stream.finish() == text;
}

/// The message of the Error by which a file is refused.
std::string refusal(const std::string& text, const std::string& config = "{}") {
  try {
    Tokenizer::parse(text, "the file", config);
  } catch (const zamba::Error& error) {
    return error.what();
  }
  return "no error";
}

/// A small file: three letters, all bytes, two merges.
json small() {
  json vocab = {{"a", 0}, {"b", 1}, {"▁", 2}, {"ab", 3}, {"▁ab", 4}, {"<unk>", 261}};
  for (int byte = 0; byte < 256; ++byte) vocab[zamba::detail::byte_token(static_cast<unsigned char>(byte))] = 5 + byte;
  json file = file_of("llama.json");
  file["model"]["vocab"] = vocab;
  file["model"]["merges"] = {"a b", {"▁", "ab"}};
  file["added_tokens"] = {{{"id", 261}, {"content", "<unk>"}, {"special", true}},
                          {{"id", 262}, {"content", "<s>"}, {"special", true}, {"lstrip", true}},
                          {{"id", 263}, {"content", "aba"}, {"single_word", true}, {"normalized", true}}};
  file["post_processor"]["special_tokens"]["<s>"]["ids"] = {262};
  return file;
}

}  // namespace

TEST_SUITE("text/tokenizer") {
  TEST_CASE("every line gets the ids that the package `tokenizers` gives it") {
    for (const std::string name : {"llama", "byte_level"}) {
      CAPTURE(name);
      CHECK(wrong_lines(Tokenizer::load(tokenizer_data(name + ".json")), name, 2400) == 0);
    }
    for (const std::string name : {"first", "always", "never", "metaspace_decoder", "ignore_merges", "unk_fused", "unk",
                                   "template", "spaced", "whole"}) {
      CAPTURE(name);
      CHECK(wrong_lines(Tokenizer::parse(variant(name).dump()), name, 400) == 0);
    }
  }

  TEST_CASE("both spellings of merges, and older ones of Metaspace and of the model, mean the same") {
    json file = metaspace("always", true);
    file["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Metaspace"}, {"replacement", "▁"}, {"add_prefix_space", true}, {"str_rep", "▁"}}}}};
    json& merges = file["model"]["merges"];
    REQUIRE(merges[0].is_string());
    for (json& merge : merges) {
      const auto text = merge.get<std::string>();
      merge = {text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)};
    }
    for (const char* key : {"type", "ignore_merges", "dropout"}) file["model"].erase(key);
    CHECK(wrong_lines(Tokenizer::parse(file.dump()), "always", 400) == 0);
  }

  TEST_CASE("texts are decoded as the package does it") {
    const auto lines = tokenizer_lines();
    for (const std::string name : {"first", "metaspace_decoder", "unk"}) {
      CAPTURE(name);
      const auto tokenizer = Tokenizer::parse(variant(name).dump());
      const auto wanted = zamba_test::tokenizer_lists<std::string>(name + ".decoded");
      REQUIRE(wanted.size() >= 400);
      int wrong = 0;
      for (std::size_t i = 0; i < wanted.size(); ++i)
        wrong += tokenizer.decode(tokenizer.encode(lines[i])) != wanted[i];
      CHECK(wrong == 0);
    }
  }

  TEST_CASE("lines and any bytes come back, whole and as a stream") {
    const auto llama = Tokenizer::load(tokenizer_data("llama.json"));
    json without_nfc = file_of("byte_level.json");
    without_nfc["normalizer"] = nullptr;
    const auto byte_level = Tokenizer::parse(without_nfc.dump());
    auto texts = tokenizer_lines();
    zamba::Random random(zamba::Seed{3});
    for (int i = 0; i < 2'000; ++i) texts.push_back(random_bytes(random, random.below(24)));
    texts.push_back(random_bytes(random, 100'000));
    int wrong = 0, exact = 0;
    for (const std::string& text : texts) {
      const Tokens bytes = byte_level.encode(text);
      wrong += byte_level.decode(bytes, {.special = true}) != text;
      wrong += !streams(byte_level, bytes, byte_level.decode(bytes));
      const Tokens tokens = llama.encode(text);
      wrong += !streams(llama, tokens, llama.decode(tokens));
      if (!comes_back(llama, text)) continue;
      ++exact;
      wrong += llama.decode(tokens) != text;
    }
    CHECK(wrong == 0);
    CHECK(exact > 3'500);
  }

  TEST_CASE("a stream begins a text or continues one, and shows special tokens if asked") {
    const auto tokenizer = Tokenizer::load(tokenizer_data("llama.json"));
    const Tokens tokens = tokenizer.encode("the river");
    TextStream begins(tokenizer), continues(tokenizer, TextStream<>::continues);
    TextStream shown(tokenizer, TextStream<>::begins, {.special = true});
    std::string from_begin, behind, all;
    for (const Token token : tokens) {
      from_begin += begins.push(token);
      behind += continues.push(token);
      all += shown.push(token);
    }
    CHECK(from_begin == "the river");
    CHECK(behind == " the river");
    CHECK(all == "<s> the river");
    CHECK(tokenizer.decode(tokens, {.special = true}) == all);

    // A character of four bytes is shown when it is whole; the beginning of one that is none, when that is certain.
    TextStream bytes(tokenizer);
    const auto byte = [&](unsigned char value) { return *tokenizer.id(zamba::detail::byte_token(value)); };
    std::string steps;
    for (const unsigned char value : {0xf0, 0x9f, 0x98, 0x80, 0xe2, 0x98, 0x41, 0xc3})
      steps += bytes.push(byte(value)) + "|";
    CHECK(steps ==
          "|||\xf0\x9f\x98\x80||"
          "|"
          "\xe2\x98"
          "A||");
    CHECK(bytes.finish() == "\xc3");
    CHECK(bytes.finish().empty());
  }

  TEST_CASE("special tokens in a text are tokens, or text if asked") {
    const auto tokenizer = Tokenizer::load(tokenizer_data("llama.json"));
    const Tokens found = tokenizer.encode("a</s>b"), text = tokenizer.encode("a</s>b", {.find_special = false});
    CHECK(std::count(found.begin(), found.end(), 2) == 1);
    CHECK(std::count(text.begin(), text.end(), 2) == 0);
    CHECK(tokenizer.decode(text) == "a</s>b");
    CHECK(tokenizer.encode("") == Tokens{1});
    CHECK(tokenizer.encode("", {.add_special = false}).empty());
    CHECK(tokenizer.encode("a").front() == 1);
    CHECK(tokenizer.encode("a", {.add_special = false}).front() != 1);
  }

  TEST_CASE("names of tokens, and special ones by custom or by tokenizer_config.json") {
    const zamba_test::TemporaryFolder folder;
    const std::string text = zamba_test::read_text(tokenizer_data("llama.json"));
    zamba_test::write_text(folder.path / "tokenizer.json", text);
    const auto alone = Tokenizer::load(folder.path);
    CHECK(alone.vocabulary() == static_cast<Index>(file_of("llama.json")["model"]["vocab"].size() + 4));
    CHECK(alone.token(1) == "<s>");
    CHECK(alone.id("<s>") == 1);
    CHECK(alone.id("single") == alone.vocabulary() - 2);
    CHECK(!alone.id("no such token"));
    CHECK(alone.is_special(2));
    CHECK(!alone.is_special(3));
    CHECK(alone.unk() == 0);
    CHECK(alone.bos() == 1);
    CHECK(alone.eos() == 2);
    CHECK(!alone.pad());
    for (Token id = 0; id < alone.vocabulary(); ++id) REQUIRE(alone.id(alone.token(id)) == id);
    CHECK_THROWS_AS(alone.token(-1), zamba::Error);
    CHECK_THROWS_AS(alone.decode(Tokens{static_cast<Token>(alone.vocabulary())}), zamba::Error);

    zamba_test::write_text(folder.path / "tokenizer_config.json",
                           R"({"bos_token": null, "eos_token": {"content": "<|left|>"}, "pad_token": "</s>"})");
    const auto named = Tokenizer::load(folder.path / "tokenizer.json");
    CHECK(named.bos() == 1);
    CHECK(named.eos() == named.id("<|left|>"));
    CHECK(named.pad() == 2);
    const auto copy = named;
    CHECK(copy.encode("the river") == alone.encode("the river"));
  }

  TEST_CASE("a megabyte of one letter, of spaces, or without any takes no longer than other text") {
    // Quadratic work would take minutes here.
    zamba::Random random(zamba::Seed{4});
    const std::size_t size = zamba::testing::unless_sanitized(1'000'000, 100'000);
    std::string letters;
    while (letters.size() < size) letters.push_back(static_cast<char>('a' + random.below(26)));
    for (const char* name : {"llama.json", "byte_level.json"}) {
      const auto tokenizer = Tokenizer::load(tokenizer_data(name));
      for (const std::string& text : {std::string(size, 'e'), std::string(size, ' '), letters}) {
        const Tokens tokens = tokenizer.encode(text);
        CHECK(tokens.size() < size);
        CHECK((tokenizer.decode(tokens) == text));
      }
    }
    const std::string marks = [] {
      std::string text = "e";
      for (int i = 0; i < 100'000; ++i) text += i % 2 ? "\u0301" : "\u0323";
      return text;
    }();
    CHECK(!Tokenizer::load(tokenizer_data("byte_level.json")).encode(marks).empty());
  }

  TEST_CASE("what is not supported or not right is refused by name") {
    const auto refused = [](const char* at, const json& value, std::string_view message) {
      json file = small();
      file[json::json_pointer(at)] = value;
      const std::string came = refusal(file.dump());
      CAPTURE(came);
      CHECK(came.find(message) != came.npos);
    };
    REQUIRE(refusal(small().dump()) == "no error");
    refused("/model/type", "WordPiece", "the file: model: type 'WordPiece' is not supported, wanted 'BPE'");
    refused("/model", nullptr, "the file: model: type 'unknown' is not supported");
    refused("/model", 3, "the file: model: wanted an object, came 3");
    refused("/model/vocab", json::array(), "the file: model: vocab: wanted an object, came an array");
    refused("/model/vocab/a", -1, "vocab: 'a': wanted an integer of 0 to 1048575, came -1");
    refused("/model/vocab/a", 1 << 20, "vocab: 'a': wanted an integer of 0 to 1048575, came 1048576");
    refused("/model/vocab/a", 1.5, "vocab: 'a': wanted an integer of 0 to 1048575, came 1.5");
    refused("/model/vocab/a", 1, "id 1 is that of another token too");
    refused("/model/vocab/<0x00>", 300, "no error");
    refused("/model/merges", nullptr, "the file: model: merges: wanted an array, came none");
    refused("/model/merges/0", "a c", "merges[0]: 'c' is not in the vocabulary");
    refused("/model/merges/0", "a ▁", "merges[0]: 'a▁' is not in the vocabulary");
    refused("/model/merges/0", "ab", "merges[0]: wanted two tokens and a space between, came \"ab\"");
    refused("/model/merges/0", json::array({"a"}), "merges[0]: wanted an array of two tokens, came an array");
    refused("/model/merges/0", 7, "merges[0]: wanted an array, came 7");
    refused("/model/unk_token", "<none>", "unk_token: '<none>' is not in the vocabulary");
    refused("/model/byte_fallback", "yes", "byte_fallback: wanted true or false, came \"yes\"");
    refused("/model/dropout", 0.1, "dropout is not supported");
    refused("/model/end_of_word_suffix", "</w>", "end_of_word_suffix is not supported");
    refused("/normalizer", {{"type", "Lowercase"}},
            "normalizer: type 'Lowercase' is not supported, wanted Prepend, Replace, NFC or Sequence");
    refused("/normalizer/normalizers/1/pattern", {{"Regex", " +"}}, "other patterns are not supported");
    refused("/pre_tokenizer", {{"type", "Digits"}}, "pre_tokenizer: type 'Digits' is not supported");
    refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "ab"}}, "replacement: wanted one character");
    refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "last"}},
            "prepend_scheme: wanted always, first or never, came \"last\"");
    refused("/post_processor/type", "BertProcessing", "post_processor: type 'BertProcessing' is not supported");
    refused("/post_processor/single/1/Sequence/id", "B", "wanted the sequence A, once");
    refused("/post_processor/special_tokens/<s>/ids/0", 264, "wanted an integer of 0 to 263, came 264");
    refused("/decoder/type", "WordPiece", "decoder: type 'WordPiece' is not supported");
    refused("/decoder/decoders/2", {{"type", "ByteLevel"}}, "this order of decoders is not supported");
    refused("/decoder/decoders/3/stop", 1, "to strip the end is not supported");
    refused("/added_tokens/0/id", 260, "'<unk>' has id 260, in the model's vocabulary 261");
    refused("/added_tokens/1/id", 0, "added_tokens[1]: id 0 is that of another token too");
    refused("/added_tokens/1/id", 1 << 20, "added_tokens[1]: id: wanted an integer of 0 to 1048575");
    refused("/added_tokens/1/content", "", "wanted a text to look for");
    refused("/added_tokens/2", small()["added_tokens"][1], "is that of another token too");

    json file = small();
    file["model"]["vocab"].erase("<0x41>");
    CHECK(refusal(file.dump()).find("wants a token for each byte, <0x41> is missing") != std::string::npos);
    CHECK(refusal("{\"model\"").starts_with("zamba: the file: not valid JSON"));
    CHECK(refusal("[]") == "zamba: the file: wanted a JSON object, came array");
    CHECK(refusal("").starts_with("zamba: the file: not valid JSON"));
    CHECK(refusal(std::string(1'000'000, '[')) == "zamba: the file: nested deeper than 64 levels");
    CHECK(refusal(small().dump(), R"({"bos_token": "<b>"})").find("bos_token: '<b>' is not in the") !=
          std::string::npos);
    CHECK_THROWS_AS(Tokenizer::load(tokenizer_data("none.json")), zamba::Error);

    file = small();
    file["model"]["byte_fallback"] = false;
    file["model"]["unk_token"] = nullptr;
    CHECK_THROWS_WITH(Tokenizer::parse(file.dump()).encode("abc"),
                      "zamba: Tokenizer: no token for byte 0x63 at offset 2 of the text");
  }

  TEST_CASE("20,000 mutations of two files are refused, or encode and decode") {
    json bytes = file_of("byte_level.json");
    const json vocabulary = bytes["model"]["vocab"];
    for (const auto& [token, id] : vocabulary.items())
      if (id > 300) bytes["model"]["vocab"].erase(token);
    bytes["model"]["merges"] = json::array();
    bytes["added_tokens"] = {{{"id", 400}, {"content", "  "}, {"normalized", true}}};
    const std::string seeds[] = {small().dump(), bytes.dump()};
    zamba::Random random(zamba::Seed{20'000});
    const auto below = [&](std::size_t count) {
      return static_cast<std::size_t>(random.below(static_cast<Index>(count)));
    };
    int accepted = 0, refused = 0, unclear = 0;
    for (int i = 0; i < 20'000; ++i) {
      std::string text = seeds[i % 2];
      // The parts around the long vocabulary are met as often as it.
      const std::size_t vocab = text.find("\"vocab\"");
      for (Index changes = 1 + random.below(3); changes > 0; --changes) {
        const std::size_t at = below(below(2) ? text.size() : std::min(vocab, text.size()));
        const std::size_t count = below(std::min<std::size_t>(text.size() - at, 40)) + 1;
        switch (below(5)) {
          case 0:
            text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
            break;
          case 1:
            text.erase(at, count);
            break;
          case 2:
            text.insert(below(text.size()), text.substr(at, count));
            break;
          case 3:
            text.insert(at, std::string_view("{}[]\",:0129").substr(below(11), 1));
            break;
          default:
            text[at] = "0123456789ab\"{}[],"[below(18)];
        }
        if (text.size() < 2) text = "{}";
      }
      try {
        const auto tokenizer = Tokenizer::parse(text, "mutated");
        ++accepted;
        tokenizer.decode(tokenizer.encode(" ab aba <s>  \xff\u0301x", {.find_special = i % 3 == 0}));
      } catch (const zamba::Error& error) {
        ++refused;
        unclear += std::string_view(error.what()).find("mutated") == std::string_view::npos &&
                   std::string_view(error.what()).find("Tokenizer: no token for") == std::string_view::npos;
      }
    }
    CHECK(unclear == 0);
    CHECK(accepted > 1'000);
    CHECK(refused > 10'000);
  }
}
