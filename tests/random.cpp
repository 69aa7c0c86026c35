// SPDX-License-Identifier: MIT
#include <zamba/random.hpp>

#include <vector>

#include <doctest/doctest.h>

using namespace zamba;

TEST_SUITE("random") {
  TEST_CASE("the same seed and stream give the same numbers, others others") {
    Random a(Seed{7}, 1), b(Seed{7}, 1), stream(Seed{7}, 2), seed(Seed{8}, 1);
    for (int i = 0; i < 100; ++i) {
      const auto bits = a.bits();
      CHECK(b.bits() == bits);
      CHECK(stream.bits() != bits);
      CHECK(seed.bits() != bits);
    }
  }

  TEST_CASE("the numbers are fixed for good: seeded runs and initial weights depend on them") {
    // From an independent program of the same definition.
    Random random(Seed{42}, 3);
    CHECK(random.bits() == 0x8bce2674af8cec1fu);
    CHECK(random.bits() == 0x24e65ed866c76464u);
    CHECK(random.uniform() == 0.4130817709598591);
  }

  TEST_CASE("moments of the distributions") {
    Random random(Seed{3});
    const int count = 200000;
    double uniform_sum = 0, uniform_square = 0, normal_sum = 0, normal_square = 0, normal_fourth = 0;
    std::vector<int> below(7);
    for (int i = 0; i < count; ++i) {
      const double u = random.uniform(), n = random.normal();
      REQUIRE(u >= 0);
      REQUIRE(u < 1);
      uniform_sum += u;
      uniform_square += u * u;
      normal_sum += n;
      normal_square += n * n;
      normal_fourth += n * n * n * n;
      ++below[static_cast<std::size_t>(random.below(7))];
    }
    // Five standard errors of each mean, 1 / sqrt(count) = 0.0022 times the deviation of what is averaged.
    const double error = 5 / std::sqrt(count);
    CHECK(std::abs(uniform_sum / count - 0.5) < 0.29 * error);
    CHECK(std::abs(uniform_square / count - 1. / 3) < 0.3 * error);
    CHECK(std::abs(normal_sum / count) < error);
    CHECK(std::abs(normal_square / count - 1) < 1.42 * error);
    CHECK(std::abs(normal_fourth / count - 3) < 9.8 * error);
    for (const int times : below) CHECK(std::abs(times - count / 7.) < 0.35 * count * error);
  }
}
