// SPDX-License-Identifier: MIT
#include <zamba/text/tokenizer/added_tokens.hpp>

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
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
using Tokens = std::vector<Token>;

}  // namespace

TEST_SUITE("text/added_tokens") {
  TEST_CASE("white space that a token takes may hold the next one, unless that takes white space before it") {
    // The ids are those of the package `tokenizers`.
    json file = json::parse(zamba_test::read_text(zamba_test::tokenizer_data("llama.json")));
    int id = 2408;
    for (const json& token : {json{{"content", " "}},
                              {{"content", "\n"}},
                              {{"content", "\t"}, {"lstrip", true}},
                              {{"content", " x"}, {"single_word", true}},
                              {{"content", "  y"}, {"lstrip", true}, {"rstrip", true}}}) {
      file["added_tokens"].push_back(token);
      file["added_tokens"].back()["id"] = id++;
    }
    const auto tokenizer = Tokenizer::parse(file.dump());
    const std::pair<const char*, Tokens> wanted[] = {
        {"<|right|> a", {1, 2405, 2408, 585}},
        {"<|right|>   a", {1, 2405, 2408, 2408, 2408, 585}},
        {"<|right|>\n\n", {1, 2405, 2409, 2409}},
        {"a<|right|>\tb", {1, 585, 2405, 660}},
        {"<|right|> xa", {1, 2405, 964, 301}},
        {"<|right|> x.", {1, 2405, 2411, 503, 271}},
        {"<|right|>  y z", {1, 2405, 2412, 2408, 503, 325}},
        {"  \t<|right|>  <|left|>a", {1, 2408, 2408, 2410, 2405, 2408, 2408, 2404, 585}},
        {"<|right|> <|right|> ", {1, 2405, 2408, 2405, 2408}},
    };
    for (const auto& one : wanted) CHECK_MESSAGE(tokenizer.encode(one.first) == one.second, std::string(one.first));
  }

  TEST_CASE("of added tokens the longest at the first place counts, as a search for each of them says") {
    zamba::Random random(zamba::Seed{8});
    const auto text_of = [&](Index size) {
      std::string text;
      for (Index i = 0; i < size; ++i) text.push_back("ab c"[random.below(4)]);
      return text;
    };
    int met = 0;
    for (int round = 0; round < 300; ++round) {
      zamba::detail::AddedTokens added;
      std::vector<std::string> patterns;
      for (Index i = 1 + random.below(8); i > 0; --i) {
        patterns.push_back(text_of(1 + random.below(6)));
        added.add(patterns.back(), {.content = patterns.back(), .id = static_cast<Token>(patterns.size() - 1)});
      }
      added.link();
      const std::string text = text_of(random.below(60));
      std::string parts, wanted;
      added.split(text, true, [&](std::size_t, std::string_view part, Token id) {
        met += id >= 0;
        parts += id < 0 ? std::string(part) : "<" + patterns[static_cast<std::size_t>(id)] + ">";
      });
      for (std::size_t at = 0; at < text.size();) {
        std::string longest;
        for (const std::string& pattern : patterns)
          if (pattern.size() > longest.size() && text.compare(at, pattern.size(), pattern) == 0) longest = pattern;
        wanted += longest.empty() ? text.substr(at, 1) : "<" + longest + ">";
        at += std::max<std::size_t>(longest.size(), 1);
      }
      CHECK(parts == wanted);
    }
    CHECK(met > 1'000);
  }
}
