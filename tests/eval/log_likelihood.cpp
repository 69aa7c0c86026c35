// SPDX-License-Identifier: MIT
#include <zamba/eval/log_likelihood.hpp>

#include <limits>

#include <doctest/doctest.h>

#include "tests/support/nets.hpp"

TEST_SUITE("eval/log_likelihood") {
  using namespace zamba_test;

  TEST_CASE("the logarithm of the softmax, for vocabularies of every size and logits of any") {
    Random random(Seed{3});
    for (const std::size_t size : {1, 2, 29, 1023, 1024, 1025, 5000}) {
      for (const double deviation : {0.1, 5., 300.}) {
        std::vector<double> logits(size);
        for (double& l : logits) l = deviation * random.normal();
        const double largest = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (const double l : logits) sum += std::exp(l - largest);
        const std::vector<float> narrow(logits.begin(), logits.end());
        for (const std::size_t token : {std::size_t{0}, size / 2, size - 1}) {
          const double wanted = logits[token] - largest - std::log(sum);
          const auto id = static_cast<Token>(token);
          // Absolute as well: log p is a difference of numbers of the size of the logits.
          const double bound = 1e-13 * (1 + std::abs(largest));
          CHECK(std::abs(log_probability(std::span<const double>(logits), id) - wanted) <= bound);
          // The logits themselves are rounded to 2^-24 of their size, the sum of their exponentials to about 2^-20.
          CHECK(std::abs(log_probability(std::span<const float>(narrow), id) - wanted) <=
                4e-6 + 2.5e-7 * (std::abs(largest) + std::abs(logits[token])));
        }
      }
    }
  }

  TEST_CASE("wrong input is refused") {
    const std::vector<float> logits{1, std::numeric_limits<float>::quiet_NaN(), 2}, good{1, 2};
    CHECK_THROWS_WITH_AS(log_probability(std::span(logits), 0), "zamba: log_probability: a logit is NaN", Error);
    CHECK_THROWS_WITH_AS(log_probability(std::span(good), 2),
                         "zamba: log_probability: token 2 is outside the vocabulary of 2", Error);
    CHECK_THROWS_AS(log_probability(std::span(good), -1), Error);
  }

  TEST_CASE("a ragged batch: every row's targets, and 0 where there are none") {
    const auto model = random_model<Hybrid, double>();
    Context<cpu> ctx(1);
    const std::vector<Token> tokens{3, 1, 4, 1, 5}, targets{1, -1, 1, 5, 28};
    const std::vector<Index> lengths{3, 2};
    auto state = model.new_state({.batch = 2, .max_length = 8});
    const auto got = log_likelihoods(model, state, {tokens, lengths}, targets);
    const std::vector<std::vector<Token>> before{{3}, {}, {3, 1, 4}, {1}, {1, 5}};
    REQUIRE(got.size() == 5);
    CHECK(got[1] == 0);
    for (const std::size_t i : {0, 2, 3, 4}) {
      auto alone = model.new_state({.max_length = 8});
      const auto logits = model.extend(ctx, alone, before[i]);
      double sum = 0;
      for (Index v = 0; v < vocabulary; ++v) sum += std::exp(logits(0, v));
      CHECK(got[i] == doctest::Approx(logits(0, targets[i]) - std::log(sum)).epsilon(1e-12));
    }
    CHECK(state.length(0) == 3);
    CHECK_THROWS_WITH_AS(log_likelihoods(model, state, {tokens, lengths}, std::vector<Token>{1}),
                         "zamba: log_likelihoods: 5 tokens but 1 targets", Error);
    CHECK(state.length(0) == 3);
  }

  TEST_CASE("a NaN is that of a row and a token") {
    const auto model = nan_where_read<Transformer, double>(28);
    const std::vector<Token> tokens{3, 1, 4, 28, 1, 5}, targets{1, 4, 1, -1, 5, 2};
    const std::vector<Index> lengths{3, 3};
    auto state = model.new_state({.batch = 2, .max_length = 8});
    CHECK_THROWS_WITH_AS(log_likelihoods(model, state, {tokens, lengths}, targets),
                         "zamba: log_likelihoods: row 1: a logit after token 1 of those given is NaN", Error);
  }
}
