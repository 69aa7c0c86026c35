// SPDX-License-Identifier: MIT
#include <zamba/kernel/simd.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

#include <doctest/doctest.h>

namespace {

using namespace zamba;

/// What docs/numerics.md promises.
template <class T>
struct Promise {
  static constexpr double exp = sizeof(T) == 8 ? 4e-16 : 2e-7, sigmoid = sizeof(T) == 8 ? 6e-16 : 3e-7,
                          softplus = sigmoid;
};

/// The greatest relative error of f against `exact`, over equal steps from first to last.
template <class T, class F, class Exact>
double greatest_error(T first, T last, F f, Exact exact) {
  constexpr int steps = 400'000;
  double greatest = 0;
  for (int i = 0; i < steps; ++i) {
    const T x = first + (last - first) * static_cast<T>(i) / steps;
    const T value = f(kernel::Pack<T>{} + x)[0];
    const long double right = exact(static_cast<long double>(x));
    greatest = std::max(greatest, static_cast<double>(std::abs((value - right) / right)));
  }
  return greatest;
}

}  // namespace

TEST_CASE_TEMPLATE("exp, sigmoid and softplus keep what they promise", T, float, double) {
  const T low = sizeof(T) == 8 ? T(-708) : T(-87), high = -low;
  const auto exact_exp = [](long double x) { return std::exp(x); };
  const auto sigmoid = [](long double x) { return 1 / (1 + std::exp(-x)); };
  const auto softplus = [](long double x) { return x > 20 ? x : std::log1p(std::exp(x)); };
  CHECK(greatest_error<T>(low, high, kernel::exp<T>, exact_exp) <= Promise<T>::exp);
  CHECK(greatest_error<T>(T(low * 1.44), 0, kernel::exp2_of_negative<T>, [](long double x) { return std::exp2(x); }) <=
        Promise<T>::exp);
  CHECK(greatest_error<T>(-2, 0, kernel::exp2_of_negative<T>, [](long double x) { return std::exp2(x); }) <=
        Promise<T>::exp);
  CHECK(greatest_error<T>(
            low, high, [](auto x) { return kernel::sigmoid<T>(x); }, sigmoid) <= Promise<T>::sigmoid);
  CHECK(greatest_error<T>(
            low, 30, [](auto x) { return kernel::softplus<T>(x); }, softplus) <= Promise<T>::softplus);
}

TEST_CASE_TEMPLATE("functions at their ends: clamped, exact where it matters, and NaN stays NaN", T, float, double) {
  const auto at = [](auto x) { return kernel::Pack<T>{} + static_cast<T>(x); };
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(kernel::exp<T>(at(0))[0] == 1);
  CHECK(kernel::exp2_of_negative<T>(at(0))[0] == 1);
  CHECK(kernel::exp2_of_negative<T>(at(-3))[0] == T(0.125));
  CHECK(kernel::exp<T>(at(-infinity))[0] > 0);
  CHECK(kernel::exp<T>(at(-infinity))[0] < 1e-37);
  CHECK(kernel::exp2_of_negative<T>(at(-infinity))[0] > 0);
  CHECK(kernel::exp2_of_negative<T>(at(-infinity))[0] < 1e-37);
  CHECK(std::isfinite(kernel::exp<T>(at(infinity))[0]));
  CHECK(kernel::softplus<T>(at(21))[0] == 21);
  CHECK(std::isnan(kernel::exp<T>(at(nan))[0]));
  CHECK(std::isnan(kernel::exp2_of_negative<T>(at(nan))[0]));
  CHECK(std::isnan(kernel::sigmoid<T>(at(nan))[0]));
  CHECK(std::isnan(kernel::softplus<T>(at(nan))[0]));
}

TEST_CASE_TEMPLATE("max and min of lanes", T, float, double) {
  kernel::Pack<T> a = {}, b = {};
  for (Index i = 0; i < kernel::lanes<T>; ++i) a[i] = static_cast<T>(i % 2), b[i] = static_cast<T>(1 - i % 2);
  a[0] = std::numeric_limits<T>::quiet_NaN(), b[0] = 5;
  for (Index i = 1; i < kernel::lanes<T>; ++i) {
    CHECK(kernel::max<T>(a, b)[i] == 1);
    CHECK(kernel::min<T>(a, b)[i] == 0);
  }
  CHECK(kernel::max<T>(a, b)[0] == 5);
  CHECK(std::isnan(kernel::max<T>(b, a)[0]));
  CHECK(std::isnan(kernel::min<T>(b, a)[0]));
}

TEST_CASE("bf16 becomes float exactly, whole registers and parts") {
  constexpr Index count = 2 * kernel::lanes<float>;
  bf16 values[count];
  for (Index i = 0; i < count; ++i) values[i] = bf16(static_cast<float>(i) * 0.37f - 3);
  for (Index first = 0; first + kernel::lanes<float> <= count; ++first)
    for (Index some = 1; some <= kernel::lanes<float>; ++some) {
      const auto pack = kernel::load_as<float>(values + first, some);
      for (Index i = 0; i < kernel::lanes<float>; ++i)
        CHECK(pack[i] == (i < some ? static_cast<float>(values[first + i]) : 0.0f));
    }
}

TEST_CASE_TEMPLATE("multiply_add: every lane, in one rounding where the machine can", T, float, double) {
  const auto of = [](T a, T b, T c) {
    return kernel::multiply_add<T>(kernel::broadcast(a), kernel::broadcast(b), kernel::broadcast(c));
  };
  for (Index i = 0; i < kernel::lanes<T>; ++i) CHECK(of(3, 5, 7)[i] == 22);
#if defined(__AVX2__) && defined(__FMA__)
  const T epsilon = std::numeric_limits<T>::epsilon(), x = 1 + epsilon;
  CHECK(of(x, x, -(1 + 2 * epsilon))[0] == epsilon * epsilon);
#endif
}
