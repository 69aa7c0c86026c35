// SPDX-License-Identifier: MIT
#include <zamba/eval/perplexity.hpp>

#include <limits>

#include <doctest/doctest.h>
#include <zamba/any_model.hpp>
#include <zamba/testing/sanitized.hpp>

#include "tests/support/judge.hpp"
#include "tests/support/temporary_folder.hpp"

namespace {

using namespace zamba_test;

/// -log p(token | before), from a state of its own, by the definition.
double loss_after(const std::vector<Token>& before, Token token) {
  auto state = model().new_state({.max_length = 64});
  const auto logits = model().extend(state, before);
  double sum = 0;
  for (Index v = 0; v < vocabulary; ++v) sum += std::exp(logits(0, v));
  return std::log(sum) - logits(0, token);
}

}  // namespace

TEST_SUITE("eval/perplexity") {
  TEST_CASE("each token but the first is judged once, by what its window has read") {
    // Each token's loss comes from a state of its own, which takes a sanitizer long.
    const Index size = testing::unless_sanitized<Index>(41, 14);
    const std::vector<Token> text = random_tokens(size);
    for (const Index length : {Index{1}, Index{5}, Index{8}, size - 2, size - 1, size, Index{100}}) {
      for (const Index stride : {0, 1, 3, 5}) {
        if (stride > length) continue;
        double sum = 0;
        Index judged = 1;
        for (Index begin = 0; judged < size; begin += stride ? stride : length)
          for (; judged <= begin + length && judged < size; ++judged)
            sum += loss_after({text.begin() + begin, text.begin() + judged}, text[static_cast<std::size_t>(judged)]);
        const LossSum loss = text_loss(model(), text, {.length = length, .stride = stride});
        CAPTURE(length);
        CAPTURE(stride);
        CHECK(loss.count == size - 1);
        CHECK(loss.sum == near(sum));
        CHECK(perplexity(loss) == near(std::exp(sum / static_cast<double>(size - 1))));
      }
    }
  }

  TEST_CASE("a token before each window: the first is judged too") {
    const std::vector<Token> text = random_tokens(23);
    for (const Index stride : {0, 2, 6}) {
      double sum = loss_after({7}, text[0]);
      Index judged = 1;
      for (Index begin = 0; judged < 23; begin += stride ? stride : 6)
        for (; judged <= begin + 6 && judged < 23; ++judged) {
          std::vector<Token> before{7};
          before.insert(before.end(), text.begin() + begin, text.begin() + judged);
          sum += loss_after(before, text[static_cast<std::size_t>(judged)]);
        }
      const LossSum loss = text_loss(model(), text, {.length = 7, .stride = stride, .begin = 7});
      CHECK(loss.count == 23);
      CHECK(loss.sum == near(sum));
    }
    CHECK(text_loss(model(), std::vector<Token>{5}, {.begin = 7}).sum == near(loss_after({7}, 5)));
  }

  TEST_CASE("packed windows are those of held_out_loss; long ones are judged in parts") {
    const TemporaryFolder folder;
    const std::vector<Token> text = random_tokens(testing::unless_sanitized<Index>(1500, 700));
    write_token_file(folder.path / "a", text, TokenWidth::u16);
    const TokenFile file = TokenFile::open(folder.path / "a", TokenWidth::u16);
    PackedBatch batch;
    for (const Index length : {16, 600, 4000}) {
      const LossSum wanted =
          held_out_loss(this_thread_context<cpu>(), model(), TokenRange::whole(file), length, 2, batch);
      const LossSum loss = text_loss(model(), text, {.length = length});
      CHECK(loss.count == wanted.count);
      CHECK(loss.sum == near(wanted.sum));
      CHECK(bits_per_byte(loss, 3) == near(bits_per_byte(wanted, 3)));
    }
  }

  TEST_CASE("a float model, to its own rounding; a rerun is bit-equal") {
    const auto small = model().to<float>();
    const std::vector<Token> text = random_tokens(200);
    const WindowOptions windows{.length = 64, .stride = 16};
    const double loss = text_loss(small, text, windows).sum;
    CHECK(loss == doctest::Approx(text_loss(model(), text, windows).sum).epsilon(2e-5));  // as docs/numerics.md
    auto& ctx = this_thread_context<cpu>();
    const int threads = ctx.threads();
    for (const int other : {1, 2}) {
      ctx = Context<cpu>(other);
      CHECK(loss == text_loss(small, text, windows).sum);
    }
    ctx = Context<cpu>(threads);
  }

  TEST_CASE("a loss that is NaN is that of a window") {
    const auto model = nan_where_read<Transformer, double>(28);
    std::vector<Token> text(41, 3);
    text[21] = 28;
    CHECK_THROWS_WITH_AS(
        text_loss(model, text, {.length = 8}),
        "zamba: text_loss: the loss of window 2 is NaN, among the 8 tokens from token 16 of the text on", Error);
  }

  TEST_CASE("a model whose type is chosen at run time gives the same") {
    const std::vector<Token> text = random_tokens(100);
    const AnyModel any(model().to<double>(), "any");
    CHECK(text_loss(any, text, {.length = 32, .stride = 9}).sum ==
          text_loss(model(), text, {.length = 32, .stride = 9}).sum);
  }

  TEST_CASE("wrong input is refused; the callback counts windows and may end the work") {
    const std::vector<Token> text = random_tokens(41);
    const auto refused = [&](std::span<const Token> tokens, const WindowOptions& options, const char* message) {
      CHECK_THROWS_WITH_AS(text_loss(model(), tokens, options), message, Error);
    };
    refused({}, {}, "zamba: text_loss: the text has 0 tokens, at least 2 are needed");
    refused({}, {.begin = 1}, "zamba: text_loss: the text has 0 tokens, at least 1 are needed");
    refused(text, {.length = 0}, "zamba: WindowOptions: length must be at least 1, got 0");
    refused(text, {.length = 1, .begin = 1}, "zamba: WindowOptions: length must be at least 2, got 1");
    refused(text, {.length = 8, .stride = 9}, "zamba: WindowOptions: stride must be 1 to 8, or 0 (packed), got 9");
    refused(text, {.length = 8, .stride = -1}, "zamba: WindowOptions: stride must be 1 to 8, or 0 (packed), got -1");
    refused(text, {.length = std::numeric_limits<Index>::min(), .begin = 1},
            "zamba: WindowOptions: length must be at least 2, got -9223372036854775808");
    refused(std::vector<Token>{1, 29}, {.begin = 1},
            "zamba: loss: targets: token 29 at position 1 is outside the vocabulary of 29");
    std::vector<Index> seen;
    CHECK_THROWS_WITH_AS(text_loss(model(), text, {.length = 8},
                                   [&](Index done, Index all) {
                                     seen.insert(seen.end(), {done, all});
                                     return done < 3;
                                   }),
                         "zamba: text_loss: ended after 3 of 5 windows", Error);
    CHECK(seen == std::vector<Index>{1, 5, 2, 5, 3, 5});
  }
}
