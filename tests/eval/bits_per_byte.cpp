// SPDX-License-Identifier: MIT
#include <zamba/eval/bits_per_byte.hpp>

#include <algorithm>
#include <cmath>

#include <doctest/doctest.h>

#include "tests/support/nets.hpp"
#include "tests/support/temporary_folder.hpp"

TEST_SUITE("eval/bits_per_byte") {
  using namespace zamba;

  TEST_CASE("every token of the range but the first is judged once, whatever the rows") {
    const zamba_test::TemporaryFolder folder;
    write_token_file(folder.path / "a", zamba_test::random_tokens(300), TokenWidth::u16);
    const TokenFile file = TokenFile::open(folder.path / "a", TokenWidth::u16);
    const auto model = zamba_test::random_model<zamba_test::Hybrid, double>();
    const TokenRange range{&file, 20, 283};
    Context<cpu> ctx(1);

    // By hand: windows of 16 targets from an empty state, the last one shorter.
    double sum = 0;
    for (Index first = range.first; first < range.last - 1; first += 16) {
      std::vector<Token> window(static_cast<std::size_t>(std::min<Index>(17, range.last - first)));
      file.copy(first, window);
      auto state = model.new_state({.max_length = 16});
      for (std::size_t i = 0; i + 1 < window.size(); ++i) {
        const auto logits = model.extend(ctx, state, window[i]);
        double total = 0;
        for (Index v = 0; v < zamba_test::vocabulary; ++v) total += std::exp(logits(0, v));
        sum += std::log(total) - logits(0, window[i + 1]);
      }
    }
    PackedBatch batch;
    for (const Index rows : {1, 3, 100}) {
      const LossSum loss = held_out_loss(ctx, model, range, 16, rows, batch);
      CHECK(loss.count == 262);
      CHECK(loss.sum == doctest::Approx(sum).epsilon(1e-11));  // float64 sums of 262 terms
    }
    CHECK_THROWS_WITH(held_out_loss(ctx, model, {&file, 5, 6}, 16, 1, batch),
                      "zamba: held_out_loss: the range has 1 tokens, at least 2 are needed");
  }

  TEST_CASE("a text without targets, or with an id outside the vocabulary, is refused before it is read") {
    const zamba_test::TemporaryFolder folder;
    std::vector<Token> tokens = zamba_test::random_tokens(300);
    std::fill_n(tokens.begin(), 20, 3);
    tokens[250] = zamba_test::vocabulary;
    write_token_file(folder.path / "a", tokens, TokenWidth::u16);
    const TokenFile file = TokenFile::open(folder.path / "a", TokenWidth::u16, 3);
    const auto model = zamba_test::random_model<zamba_test::Hybrid, float>();
    PackedBatch batch;
    Context<cpu> ctx(1);
    CHECK_THROWS_WITH(
        held_out_loss(ctx, model, {&file, 0, 20}, 16, 1, batch),
        ("zamba: held_out_loss: '" + file.path().string() + "' has nothing but document ends in [0, 20), so no target")
            .c_str());
    CHECK_THROWS_WITH(held_out_loss(ctx, model, TokenRange::whole(file), 16, 1, batch),
                      ("zamba: TokenFile '" + file.path().string() +
                       "': token 250 is 29, outside a vocabulary of 29; wrong width or wrong tokenizer?")
                          .c_str());
    CHECK(held_out_loss(ctx, model, {&file, 0, 250}, 16, 1, batch).count > 200);
    CHECK_THROWS_AS(bits_per_byte({.sum = 1, .count = 1}, 0), Error);
    CHECK_THROWS_AS(bits_per_byte({.sum = 1, .count = 1}, std::nan("")), Error);
  }

  TEST_CASE("the unit") {
    // Three nats a token, four bytes a token.
    CHECK(bits_per_byte({.sum = 300, .count = 100}, 4) == doctest::Approx(3 / std::log(2.0) / 4));
    // A model that finds all 256 bytes equally likely.
    CHECK(bits_per_byte({.sum = 7 * std::log(256.0), .count = 7}) == doctest::Approx(8));
  }
}
