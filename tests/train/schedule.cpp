// SPDX-License-Identifier: MIT
#include <cmath>
#include <numbers>
#include <tuple>
#include <utility>

#include <doctest/doctest.h>
#include <zamba/train/schedule.hpp>

using zamba::LearningRate;

TEST_SUITE("train/schedule") {
  TEST_CASE("each form has exact ends and the value of its formula between") {
    constexpr zamba::Index n = 1000;
    const auto cosine = LearningRate::cosine(1.5e-4, 7.5e-5);
    const auto linear = LearningRate::linear(0.3, 0.1);
    const auto exponential = LearningRate::exponential(1e-2, 1e-6);
    for (const auto& [rate, from, to] :
         {std::tuple{cosine, 1.5e-4, 7.5e-5}, {linear, 0.3, 0.1}, {exponential, 1e-2, 1e-6}}) {
      CHECK(rate.at(0, n) == from);
      CHECK(rate.at(n, n) == to);
      for (zamba::Index i = 1; i <= n; ++i) CHECK(rate.at(i, n) < rate.at(i - 1, n));
    }
    // By hand: halfway a cosine and a line are at the mean, an exponential at the geometric mean. The bound is a few
    // roundings of double.
    CHECK(cosine.at(500, n) == doctest::Approx(1.125e-4).epsilon(1e-14));
    CHECK(linear.at(500, n) == doctest::Approx(0.2).epsilon(1e-14));
    CHECK(exponential.at(500, n) == doctest::Approx(1e-4).epsilon(1e-14));
    CHECK(cosine.at(250, n) == doctest::Approx(7.5e-5 + 7.5e-5 * (1 + std::numbers::sqrt2 / 2) / 2).epsilon(1e-14));
    CHECK(exponential.at(250, n) == doctest::Approx(1e-3).epsilon(1e-14));
    for (const zamba::Index i : {0, 1, 999, 1000}) CHECK(LearningRate::constant(0.25).at(i, n) == 0.25);
  }

  TEST_CASE("Zamba's two phases") {
    constexpr zamba::Index phase_1 = 950'000'000'000, phase_2 = 50'000'000'000;
    const auto pretraining =
        LearningRate::warm_up(1.5e-4, {.fraction = 0.01}).then(LearningRate::cosine(1.5e-4, 7.5e-5));
    CHECK(pretraining.at(0, phase_1) == 0);
    CHECK(pretraining.at(phase_1 / 200, phase_1) == doctest::Approx(0.75e-4).epsilon(1e-14));
    CHECK(pretraining.at(phase_1 / 100, phase_1) == 1.5e-4);
    // The middle of the cosine: half of the 99 % after the warm-up.
    CHECK(pretraining.at(phase_1 / 1000 * 505, phase_1) == doctest::Approx(1.125e-4).epsilon(1e-14));
    CHECK(pretraining.at(phase_1, phase_1) == 7.5e-5);

    const auto annealing = LearningRate::linear(7.5e-5, 1.1e-4)
                               .over({.tokens = 1'000'000'000})
                               .then(LearningRate::exponential(1.1e-4, 1e-6));
    CHECK(annealing.at(0, phase_2) == 7.5e-5);
    CHECK(annealing.at(1'000'000'000, phase_2) == 1.1e-4);
    CHECK(annealing.at(25'500'000'000, phase_2) == doctest::Approx(std::sqrt(1.1e-4 * 1e-6)).epsilon(1e-13));
    CHECK(annealing.at(phase_2, phase_2) == 1e-6);
  }

  TEST_CASE("three pieces, and a last one shorter than the phase") {
    const auto rate = LearningRate::warm_up(1, {.tokens = 10})
                          .then(LearningRate::constant(1).over({.fraction = 0.5}))
                          .then(LearningRate::linear(1, 0.5).over({.tokens = 20}));
    CHECK(rate.at(5, 100) == 0.5);
    CHECK(rate.at(10, 100) == 1);
    CHECK(rate.at(59, 100) == 1);
    CHECK(rate.at(70, 100) == 0.75);
    CHECK(rate.at(80, 100) == 0.5);
    CHECK(rate.at(100, 100) == 0.5);  // the final value holds
    // Pieces whose fractions fill the phase but for rounding.
    const auto full =
        LearningRate::constant(1).over({.fraction = 0.1}).then(LearningRate::constant(2).over({.fraction = 0.9}));
    CHECK(full.at(3, 3) == 2);
  }

  TEST_CASE("schedules are values: compared and printed exactly") {
    const auto rate =
        LearningRate::warm_up(1.5e-4, {.fraction = 0.01}, 1e-6).then(LearningRate::cosine(1.5e-4, 7.5e-5));
    CHECK(rate.str() == "linear 1e-06 to 0.00015 over 0.01 of the phase, cosine 0.00015 to 7.5e-05");
    CHECK(LearningRate::constant(0.1).over({.tokens = 7}).str() == "constant 0.1 over 7 tokens");
    auto copy = rate;
    CHECK(copy == rate);
    const auto near = LearningRate::constant(std::nextafter(0.1, 1.0));
    CHECK(near != LearningRate::constant(0.1));
    CHECK(near.str() != LearningRate::constant(0.1).str());
    CHECK(LearningRate::linear(2, 1) != LearningRate::cosine(2, 1));
    CHECK(LearningRate::constant(1).over({.tokens = 7}) != LearningRate::constant(1).over({.tokens = 8}));
  }

  TEST_CASE("no value is above the peak, and all are finite") {
    const auto rate = LearningRate::warm_up(3, {.tokens = 10}, 1e-300)
                          .then(LearningRate::exponential(2, 1e-290).over({.fraction = 0.3}))
                          .then(LearningRate::cosine(1e-290, 4).over({.fraction = 5e-324}))
                          .then(LearningRate::linear(4, 0));
    CHECK(rate.peak() == 4);
    for (zamba::Index i = 0; i <= 100; ++i) {
      CHECK(rate.at(i, 100) >= 0);
      CHECK(rate.at(i, 100) <= 4);
    }
  }

  TEST_CASE("nonsense is refused, and the message says what came") {
    CHECK_THROWS_WITH(LearningRate::constant(-1),
                      "zamba: LearningRate: constant needs finite values of 0 or more, got -1 to -1");
    CHECK_THROWS_AS(LearningRate::linear(0, std::nan("")), zamba::Error);
    CHECK_THROWS_AS(LearningRate::cosine(INFINITY, 0), zamba::Error);
    CHECK_THROWS_WITH(LearningRate::exponential(1, 0),
                      "zamba: LearningRate: exponential needs both ends above 0, got 1 to 0; linear or cosine reach 0");
    // Each end is a number, and their ratio, which its values are powers of, is none.
    for (const auto& [from, to] : {std::pair{1e-300, 1e300}, {1e300, 1e-300}, {5e-324, 1.}})
      CHECK_THROWS_AS(LearningRate::exponential(from, to), zamba::Error);
    CHECK_THROWS_AS(LearningRate::exponential(std::nan(""), 1), zamba::Error);
    CHECK_THROWS_AS(LearningRate::warm_up(1, {.fraction = HUGE_VAL}), zamba::Error);
    const auto one = LearningRate::constant(1);
    CHECK_THROWS_AS(one.over({}), zamba::Error);
    CHECK_THROWS_AS(one.over({.tokens = -5}), zamba::Error);
    CHECK_THROWS_AS(one.over({.tokens = 5, .fraction = 0.5}), zamba::Error);
    CHECK_THROWS_AS(one.over({.fraction = 1.5}), zamba::Error);
    CHECK_THROWS_AS(one.over({.fraction = -0.5}), zamba::Error);
    CHECK_THROWS_AS(one.over({.fraction = std::nan("")}), zamba::Error);
    CHECK_THROWS_WITH(one.then(one),
                      "zamba: LearningRate: give 'constant 1' a length with over() before something follows it");
    const auto warm = LearningRate::warm_up(1, {.tokens = 100});
    CHECK_THROWS_WITH(warm.check(99),
                      "zamba: LearningRate: 'linear 0 to 1 over 100 tokens' needs 100 tokens, but its phase has 99");
    CHECK_NOTHROW(warm.check(100));
    CHECK_THROWS_WITH(
        warm.then(one).at(0, 100),
        "zamba: LearningRate: nothing of a phase of 100 tokens is left for 'constant 1' in 'linear 0 to 1 "
        "over 100 tokens, constant 1'");
    CHECK_THROWS_WITH(one.at(11, 10), "zamba: LearningRate: token 11 is outside a phase of 10 tokens");
    CHECK_THROWS_AS(one.at(-1, 10), zamba::Error);
    CHECK_THROWS_AS(one.at(0, 0), zamba::Error);
  }
}
