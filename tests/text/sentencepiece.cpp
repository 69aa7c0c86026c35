// SPDX-License-Identifier: MIT
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <zamba/random.hpp>
#include <zamba/text/sentencepiece.hpp>
#include <zamba/text/text_stream.hpp>

#include "tests/support/temporary_folder.hpp"
#include "tests/support/tokenizer_lines.hpp"

using zamba::SentencePiece;
using zamba::Token;

TEST_SUITE("text/sentencepiece") {
  TEST_CASE("ids are those of another release of the library, and texts come back, whole and as a stream") {
    const auto tokenizer = SentencePiece::load(zamba_test::tokenizer_data("llama.model"));
    const auto lines = zamba_test::tokenizer_lines();
    const auto wanted = zamba_test::tokenizer_ids("sentencepiece");
    int wrong_ids = 0, wrong_texts = 0, wrong_streams = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const auto tokens = tokenizer.encode(lines[i], {.add_special = false});
      wrong_ids += tokens != wanted[i];
      const std::string text = tokenizer.decode(tokens);
      if (lines[i].find(zamba::detail::space_mark) == std::string::npos) wrong_texts += text != lines[i];
      zamba::TextStream<SentencePiece> stream(tokenizer);
      std::string streamed;
      for (const Token token : tokens) streamed += stream.push(token);
      wrong_streams += streamed + stream.finish() != text;
    }
    CHECK(wanted.size() >= 400);
    CHECK(wrong_ids == 0);
    CHECK(wrong_texts == 0);
    CHECK(wrong_streams == 0);
  }

  TEST_CASE("special tokens, names and bytes") {
    const auto tokenizer = SentencePiece::load(zamba_test::tokenizer_data("llama.model"));
    CHECK(tokenizer.vocabulary() == 700);
    CHECK(tokenizer.unk() == 0);
    CHECK(tokenizer.bos() == 1);
    CHECK(tokenizer.eos() == 2);
    CHECK(!tokenizer.pad());
    CHECK(tokenizer.id("<s>") == 1);
    CHECK(tokenizer.id("<unk>") == 0);
    CHECK(!tokenizer.id("no such piece"));
    CHECK(tokenizer.token(1) == "<s>");
    CHECK(tokenizer.is_special(2));
    CHECK(!tokenizer.is_special(3));
    CHECK(tokenizer.encode("a").front() == 1);
    CHECK(tokenizer.decode(tokenizer.encode(" a")) == " a");
    CHECK(tokenizer.decode(std::vector<Token>{1, 3 + 'a', 2}) == "a");
    CHECK(tokenizer.decode(std::vector<Token>{1, 3 + 0xff, 2}, {.special = true}) == "<s>\xff</s>");
    CHECK_THROWS_WITH(tokenizer.token(700), "zamba: SentencePiece: token 700 is not in the vocabulary of 700");
    CHECK_THROWS_AS(tokenizer.decode(std::vector<Token>{-1}), zamba::Error);
  }

  TEST_CASE("files that are no model are refused") {
    const zamba_test::TemporaryFolder folder;
    CHECK_THROWS_AS(SentencePiece::load(folder.path), zamba::Error);
    zamba_test::write_text(folder.path / "tokenizer.model", "no model");
    CHECK_THROWS_AS(SentencePiece::load(folder.path), zamba::Error);
    CHECK_THROWS_AS(SentencePiece::parse(""), zamba::Error);
    CHECK_THROWS_AS(SentencePiece::load(std::string(300, 'x')), zamba::Error);
  }

  TEST_CASE("damaged files are refused, or encode and decode") {
    const std::string whole = zamba_test::read_text(zamba_test::tokenizer_data("llama.model"));
    zamba::Random random(zamba::Seed{5});
    const auto below = [&](std::size_t count) {
      return static_cast<std::size_t>(random.below(static_cast<zamba::Index>(count)));
    };
    int accepted = 0, refused = 0;
    for (int i = 0; i < 400; ++i) {
      std::string bytes = whole;
      for (int changes = 0; changes < 3; ++changes) bytes[below(bytes.size())] = static_cast<char>(below(256));
      if (i % 4 == 0) bytes.resize(below(bytes.size()));
      try {
        const auto tokenizer = SentencePiece::parse(bytes, "damaged");
        tokenizer.decode(tokenizer.encode("the river \xff\u0301 1984"));
        ++accepted;
      } catch (const zamba::Error&) {
        ++refused;
      }
    }
    CHECK(accepted > 0);
    CHECK(refused > 0);
  }
}
