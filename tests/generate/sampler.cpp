// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include <doctest/doctest.h>
#include <zamba/generate/sampler.hpp>
#include <zamba/testing/sanitized.hpp>

namespace {

using zamba::Index;
using zamba::Sampler;
using zamba::SamplerOptions;
using zamba::Seed;
using zamba::Token;

constexpr double inf = std::numeric_limits<double>::infinity();

/// How often each token came in `draws` draws.
std::vector<Index> count(Sampler& sampler, const std::vector<double>& logits, Index draws,
                         const std::vector<Token>& history = {}) {
  std::vector<Index> counts(logits.size(), 0);
  for (Index i = 0; i < draws; ++i) ++counts[static_cast<std::size_t>(sampler.sample(logits, history))];
  return counts;
}

/// Pearson's statistic against the wanted probabilities; a token of probability 0 must never come.
void check_distribution(const std::vector<Index>& counts, const std::vector<double>& wanted) {
  double draws = 0, statistic = 0;
  int cells = 0;
  for (const Index c : counts) draws += static_cast<double>(c);
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (wanted[i] == 0) {
      CHECK(counts[i] == 0);
      continue;
    }
    const double expected = draws * wanted[i], difference = static_cast<double>(counts[i]) - expected;
    statistic += difference * difference / expected;
    ++cells;
  }
  // The upper 1e-4 points of chi-square with 1 to 5 degrees of freedom. The seeds are fixed: it passes or it does not.
  const double bound[] = {0, 15.14, 18.42, 21.11, 23.51, 25.74};
  REQUIRE(cells <= 6);
  CHECK(statistic <= bound[cells - 1]);
}

std::vector<double> logs(std::vector<double> probabilities) {
  for (double& p : probabilities) p = std::log(p);
  return probabilities;
}

/// Under a sanitizer enough for Pearson's statistic, not to see what is a little off.
constexpr Index many = zamba::testing::unless_sanitized(200'000, 4'000);

}  // namespace

TEST_SUITE("generate/sampler") {
  TEST_CASE("the plain distribution, by counting") {
    Sampler sampler({}, Seed{1}, 5);
    check_distribution(count(sampler, logs({0.5, 0.25, 0.125, 0.1, 0.025}), many), {0.5, 0.25, 0.125, 0.1, 0.025});
    // A wrong distribution is seen: 0.5 against 0.51 is 9 deviations of 200,000 draws.
    const auto counts = count(sampler, logs({0.5, 0.5, 1e-300, 1e-300, 1e-300}), many);
    CHECK(std::abs(static_cast<double>(counts[0]) / many - 0.5) < 4 * 0.5 / std::sqrt(double{many}));
    CHECK(counts[0] + counts[1] == many);
  }

  TEST_CASE("temperature") {
    // T = 0.5 squares probabilities: 16, 4, 1, out of 21; T = 2 takes roots: 4, 2, 1 out of 7 of 16, 4, 1.
    Sampler cold({.temperature = 0.5}, Seed{2}, 3), hot({.temperature = 2}, Seed{2}, 3);
    check_distribution(count(cold, logs({4, 2, 1}), many), {16. / 21, 4. / 21, 1. / 21});
    check_distribution(count(hot, logs({16, 4, 1}), many), {4. / 7, 2. / 7, 1. / 7});
  }

  TEST_CASE("top-k keeps exactly k, of equal ones the lowest ids") {
    Sampler sampler({.top_k = 3}, Seed{3}, 6);
    check_distribution(count(sampler, logs({1, 4, 2, 2, 2, 0.5}), many), {0, 0.5, 0.25, 0.25, 0, 0});
    Sampler wide({.top_k = 10}, Seed{3}, 3);
    check_distribution(count(wide, logs({1, 2, 1}), many), {0.25, 0.5, 0.25});
    Sampler one({.top_k = 1}, Seed{3}, 4);
    for (const Index c : {0, 1, 2})
      CHECK(count(one, {1, 7, 7, 3}, 100)[static_cast<std::size_t>(c)] == (c == 1 ? 100 : 0));
  }

  TEST_CASE("top-p keeps the smallest set that holds p, at least one token") {
    const auto logits = logs({0.1, 0.4, 0.3, 0.15, 0.05});
    Sampler two({.top_p = 0.69}, Seed{4}, 5), three({.top_p = 0.71}, Seed{4}, 5), one({.top_p = 1e-9}, Seed{4}, 5);
    check_distribution(count(two, logits, many), {0, 4. / 7, 3. / 7, 0, 0});
    check_distribution(count(three, logits, many), {0, 40. / 85, 30. / 85, 15. / 85, 0});
    CHECK(count(one, logits, 1000)[1] == 1000);
    // Exact in binary: half the mass is in one token, and the set of one holds p = 0.5. Of equal ones, the lowest id.
    Sampler half({.top_p = 0.5}, Seed{4}, 3), half_of_equals({.top_p = 0.5}, Seed{4}, 5);
    CHECK(count(half, {0, 0, std::log(2.0)}, 1000)[2] == 1000);
    check_distribution(count(half_of_equals, {-inf, 3, 3, 3, 3}, many), {0, 0.5, 0.5, 0, 0});
  }

  TEST_CASE("top-p looks at the probabilities left by top-k") {
    // Of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 4/7 and 3/7: p = 0.5 then keeps one. Without the top-k it keeps two.
    const auto logits = logs({0.4, 0.3, 0.2, 0.1});
    Sampler both({.top_k = 2, .top_p = 0.5}, Seed{5}, 4), alone({.top_p = 0.5}, Seed{5}, 4);
    CHECK(count(both, logits, 1000)[0] == 1000);
    check_distribution(count(alone, logits, many), {4. / 7, 3. / 7, 0, 0});
  }

  TEST_CASE("min-p is relative to the largest") {
    const auto logits = logs({0.5, 0.26, 0.16, 0.08});
    Sampler half({.min_p = 0.5}, Seed{6}, 4), third({.min_p = 0.3}, Seed{6}, 4), all({.min_p = 1}, Seed{6}, 4);
    check_distribution(count(half, logits, many), {0.5 / 0.76, 0.26 / 0.76, 0, 0});
    check_distribution(count(third, logits, many), {0.5 / 0.92, 0.26 / 0.92, 0.16 / 0.92, 0});
    check_distribution(count(all, {2, 1, 2, 2}, many), {1. / 3, 0, 1. / 3, 1. / 3});
    // After the temperature: at T = 2 the ratio 0.26 becomes 0.51.
    Sampler hot({.temperature = 2, .min_p = 0.5}, Seed{6}, 2);
    check_distribution(count(hot, logs({1, 0.26}), many),
                       {1 / (1 + std::sqrt(0.26)), std::sqrt(0.26) / (1 + std::sqrt(0.26))});
  }

  TEST_CASE("repetition penalty: once a token, by the sign of the logit, before the temperature") {
    // Token 0: 2 / 2 = 1; token 1: -1 * 2 = -2; token 2: 0 stays; token 3 is not in the history.
    const double a = std::exp(1.0), b = std::exp(-2.0), sum = a + b + 2;
    Sampler sampler({.repetition_penalty = 2}, Seed{7}, 4);
    check_distribution(count(sampler, {2, -1, 0, 0}, many, {0, 1, 0, 0, 2}), {a / sum, b / sum, 1 / sum, 1 / sum});
    Sampler greedy({.temperature = 0, .repetition_penalty = 2}, Seed{7}, 2);
    CHECK(greedy.sample(std::vector<double>{3, 2}, std::vector<Token>{0}) == 1);
    CHECK(greedy.sample(std::vector<double>{3, 2}) == 0);  // nothing is remembered from the call before
    Sampler reward({.temperature = 0, .repetition_penalty = 0.5}, Seed{7}, 2);
    CHECK(reward.sample(std::vector<double>{2, 3}, std::vector<Token>{0}) == 0);
  }

  TEST_CASE("greedy and argmax: the largest, of equal ones the lowest id") {
    Sampler greedy({.temperature = 0, .top_k = 2}, Seed{8}, 4);
    CHECK(greedy.sample(std::vector<float>{1, 5, 5, 2}) == 1);
    CHECK(greedy.sample(std::vector<float>{-3, -4, -2, -2}) == 2);
    CHECK(greedy.sample(std::vector<double>{-inf, 1, inf, inf}) == 2);
    CHECK(zamba::argmax(std::span<const float>(std::vector<float>{0.5f, 2.f, 2.f})) == 1);
    CHECK_THROWS_WITH(zamba::argmax(std::span<const float>()), "zamba: argmax: there are no logits");
  }

  TEST_CASE("infinities and extreme values") {
    Sampler sampler({.top_p = 0.99}, Seed{9}, 4);
    check_distribution(count(sampler, {inf, 0, inf, 1e308}, many), {0.5, 0, 0.5, 0});
    check_distribution(count(sampler, {-inf, 1000, -inf, 1000}, many), {0, 0.5, 0, 0.5});
    check_distribution(count(sampler, {-1e308, -1e308, 1e308, -inf}, 1000), {0, 0, 1, 0});
    Sampler tiny({.temperature = 1e-300}, Seed{9}, 3);
    check_distribution(count(tiny, {1e300, 1, 1e300}, many), {0.5, 0, 0.5});
    CHECK_THROWS_WITH(sampler.sample(std::vector<double>(4, -inf)), "zamba: argmax: every logit is -inf");
  }

  TEST_CASE("excluded tokens are never drawn, and count nowhere") {
    const std::vector<Token> excluded{1, 4, 1};
    Sampler plain({}, Seed{10}, 5, 0, excluded), two({.top_k = 2}, Seed{10}, 5, 0, excluded);
    Sampler greedy({.temperature = 0}, Seed{10}, 5, 0, excluded), half({.min_p = 0.5}, Seed{10}, 5, 0, excluded);
    const auto logits = logs({1, 8, 2, 4, 64});
    check_distribution(count(plain, logits, many), {1. / 7, 0, 2. / 7, 4. / 7, 0});
    check_distribution(count(two, logits, many), {0, 0, 1. / 3, 2. / 3, 0});
    check_distribution(count(half, logits, many), {0, 0, 1. / 3, 2. / 3, 0});
    CHECK(greedy.sample(logits) == 3);
    CHECK(greedy.sample(std::vector<double>{1, std::nan(""), 3, 2, inf}) == 2);
    CHECK_THROWS_WITH(greedy.sample(std::vector<double>{-inf, 1, -inf, -inf, 1}), "zamba: argmax: every logit is -inf");
    CHECK_THROWS_WITH(Sampler({}, Seed{1}, 4, 0, excluded),
                      "zamba: Sampler: excluded token 4 is outside the vocabulary of 4");
    CHECK_THROWS_WITH(Sampler({}, Seed{1}, 2, 0, std::vector<Token>{1, 0}),
                      "zamba: Sampler: excluded tokens are all of the vocabulary of 2");
  }

  TEST_CASE("a seed reproduces its draws; other seeds and streams draw otherwise; float equals double") {
    const std::vector<float> logits = {0.1f, 0.2f, 0.3f, 0.4f, -1.f, 0.f, 1.f, 0.5f};
    const std::vector<double> wide(logits.begin(), logits.end());
    const SamplerOptions options{.temperature = 0.8, .top_k = 7, .top_p = 0.95, .min_p = 0.01};
    Sampler a(options, Seed{42}, 8), b(options, Seed{42}, 8), seed(options, Seed{43}, 8),
        stream(options, Seed{42}, 8, 1);
    int seed_differs = 0, stream_differs = 0;
    for (int i = 0; i < 500; ++i) {
      const Token token = a.sample(logits);
      CHECK(b.sample(wide) == token);
      seed_differs += seed.sample(logits) != token;
      stream_differs += stream.sample(logits) != token;
    }
    CHECK(seed_differs > 250);  // about 5 of 6 differ where the draws are independent
    CHECK(stream_differs > 250);
  }

  TEST_CASE("the set that is kept agrees with a plain sort, on random logits") {
    zamba::Random random(Seed{10});
    for (int trial = 0; trial < 50; ++trial) {
      std::vector<double> logits(50);
      for (double& logit : logits) logit = std::floor(4 * random.normal());  // ties are common
      const SamplerOptions options{.top_k = 1 + random.below(20), .top_p = 0.05 + 0.9 * random.uniform()};
      std::vector<Token> order(50);
      for (Token i = 0; i < 50; ++i) order[static_cast<std::size_t>(i)] = i;
      const auto at = [&](Token i) { return logits[static_cast<std::size_t>(i)]; };
      std::stable_sort(order.begin(), order.end(), [&](Token i, Token j) { return at(i) > at(j); });
      order.resize(static_cast<std::size_t>(options.top_k));
      double total = 0, mass = 0;
      for (const Token i : order) total += std::exp(at(i) - at(order[0]));
      std::set<Token> kept;
      for (const Token i : order) {
        if (mass >= options.top_p * total) break;
        mass += std::exp(at(i) - at(order[0]));
        kept.insert(i);
      }
      Sampler sampler(options, Seed{11}, 50);
      for (int i = 0; i < 300; ++i) CHECK(kept.count(sampler.sample(logits)) == 1);
    }
  }

  TEST_CASE("errors name the thing and what came") {
    const Seed seed{1};
    CHECK_THROWS_WITH(Sampler({.temperature = -1}, seed, 4),
                      "zamba: SamplerOptions: temperature must be 0 (greedy) or more, got -1");
    CHECK_THROWS_WITH(Sampler({.top_k = -2}, seed, 4), "zamba: SamplerOptions: top_k must be 0 (off) or more, got -2");
    CHECK_THROWS_WITH(Sampler({.top_p = 0}, seed, 4),
                      "zamba: SamplerOptions: top_p must be above 0 and at most 1 (off), got 0");
    CHECK_THROWS_WITH(Sampler({.min_p = 1.5}, seed, 4),
                      "zamba: SamplerOptions: min_p must be between 0 (off) and 1, got 1.5");
    CHECK_THROWS_WITH(Sampler({.repetition_penalty = 0}, seed, 4),
                      "zamba: SamplerOptions: repetition_penalty must be above 0 (1: off), got 0");
    for (const double bad : {std::nan(""), inf}) {
      CHECK_THROWS_AS(Sampler({.temperature = bad}, seed, 4), zamba::Error);
      CHECK_THROWS_AS(Sampler({.top_p = bad}, seed, 4), zamba::Error);
      CHECK_THROWS_AS(Sampler({.min_p = bad}, seed, 4), zamba::Error);
      CHECK_THROWS_AS(Sampler({.repetition_penalty = bad}, seed, 4), zamba::Error);
    }
    CHECK_THROWS_WITH(Sampler({}, seed, 0), "zamba: Sampler: the vocabulary must have 1 to 2147483647 tokens, got 0");
    Sampler sampler({.repetition_penalty = 1.1}, seed, 4);
    CHECK_THROWS_WITH(sampler.sample(std::vector<float>(3)), "zamba: Sampler: wanted 4 logits, got 3");
    CHECK_THROWS_WITH(sampler.sample(std::vector<float>{0, 1, NAN, 2}), "zamba: argmax: the logit of token 2 is NaN");
    CHECK_THROWS_WITH(sampler.sample(std::vector<float>{NAN, 1, 3, 2}), "zamba: argmax: the logit of token 0 is NaN");
    CHECK_THROWS_WITH(sampler.sample(std::vector<float>(4), std::vector<Token>{1, 4}),
                      "zamba: Sampler: token 4 of the history is outside the vocabulary of 4");
    CHECK_THROWS_AS(sampler.sample(std::vector<float>(4), std::vector<Token>{-1}), zamba::Error);
  }
}
