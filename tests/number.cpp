// SPDX-License-Identifier: MIT
#include <zamba/number.hpp>

#include <cmath>
#include <limits>

#include <doctest/doctest.h>

#include "support/extend_properties.hpp"

using namespace zamba_test;

TEST_SUITE("number") {
  TEST_CASE("bf16 rounds to nearest, ties to even") {
    const auto rounded = [](float value) { return static_cast<float>(bf16(value)); };
    for (const float exact : {0.f, -0.f, 1.f, -2.5f, 0x1.fep127f, 0x1p-126f, 0x1p-133f}) CHECK(rounded(exact) == exact);
    CHECK(rounded(1 + 0x1p-8f) == 1);                // a tie: the even neighbour is below
    CHECK(rounded(1 + 3 * 0x1p-8f) == 1 + 0x1p-6f);  // a tie: the even neighbour is above
    CHECK(rounded(1 + 0x1.01p-8f) == 1 + 0x1p-7f);
    CHECK(rounded(-1 - 0x1.01p-8f) == -1 - 0x1p-7f);
    CHECK(rounded(std::numeric_limits<float>::max()) == INFINITY);
    CHECK(rounded(INFINITY) == INFINITY);
    CHECK(rounded(-INFINITY) == -INFINITY);
    CHECK(std::isnan(rounded(NAN)));
    CHECK(std::isnan(rounded(std::bit_cast<float>(0x7f800001u))));  // its payload would be lost, and leave an infinity
    CHECK(std::signbit(rounded(-0.f)));
  }

  TEST_CASE_TEMPLATE("NaN and infinity are told by bits", F, float, double) {
    const F infinity = std::numeric_limits<F>::infinity(), nan = std::numeric_limits<F>::quiet_NaN();
    for (const F value : {nan, -nan, std::numeric_limits<F>::signaling_NaN()}) {
      CHECK(is_nan(value));
      CHECK_FALSE(is_finite(value));
    }
    for (const F value : {infinity, -infinity}) {
      CHECK_FALSE(is_nan(value));
      CHECK_FALSE(is_finite(value));
    }
    for (const F value : {F(0), -F(0), F(1), std::numeric_limits<F>::max(), std::numeric_limits<F>::denorm_min()}) {
      CHECK_FALSE(is_nan(value));
      CHECK(is_finite(value));
      CHECK(is_finite(-value));
    }
  }

  TEST_CASE("every half is the float it stands for") {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float value = f16{static_cast<std::uint16_t>(bits)};
      const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
      double wanted = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
      if (exponent == 31) wanted = mantissa ? NAN : INFINITY;
      if (bits & 0x8000) wanted = -wanted;
      CHECK((std::isnan(wanted) ? std::isnan(value) : static_cast<double>(value) == wanted));
      CHECK(std::signbit(value) == (bits >> 15 == 1));
    }
  }

  TEST_CASE("compute types") {
    CHECK(std::is_same_v<compute_t<bf16>, float>);
    CHECK(std::is_same_v<compute_t<const double>, double>);
    CHECK(std::is_same_v<activation_t<const bf16, cpu>, float>);
    CHECK(std::is_same_v<activation_t<bf16, cuda>, bf16>);
  }

  TEST_CASE("extend: two shared blocks stored in bf16") { check_extend<TwoCopies, bf16>(); }

  TEST_CASE("storage types agree: float and bf16 with double of the same weights") {
    const auto stored = random_model<TwoCopies, bf16>();
    const auto as_float = stored.to<float>();
    const auto as_double = stored.to<double>();
    const auto tokens = random_tokens(30);
    const auto logits = [&](const auto& model) {
      auto state = model.new_state({.max_length = 30});
      return values(model.extend(state, tokens, Positions::all));
    };
    const auto wanted = logits(as_double);
    CHECK(relative_error(logits(as_float), wanted) <= rounding<float>);
    // These weights carry a relative error of eps in an activation to one of about 30 eps in the logits; keys and
    // values are rounded by 2^-9, which is 2^15 times the eps of float.
    CHECK(relative_error(logits(stored), wanted) <= 50 * 0x1p-9);
    CHECK(relative_error(logits(stored), wanted) > 0x1p-9);  // the caches were bf16
    const auto back = as_double.to<bf16>();
    for (std::size_t i = 0; i < stored.entries().size(); ++i)
      CHECK(back.read(back.entries()[i]) == stored.read(stored.entries()[i]));
  }
}
