// SPDX-License-Identifier: MIT
// adamw_step against a plain loop in double, and the sum of squares.
#include <zamba/ops/adamw_step.hpp>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tests/support/arrays.hpp>

using namespace zamba;
using zamba::testing::random_values;
using zamba::testing::relative_error;

namespace {

/// A parameter with its moments, as one step finds them.
template <class W, class F>
struct Problem {
  explicit Problem(Index n)
      : weight(random_values<W>(n, 1)),
        master(weight.begin(), weight.end()),
        gradient(random_values<F>(n, 2)),
        m(random_values<F>(n, 3)),
        v(random_values<F>(n, 4)) {
    for (F& value : v) value *= value;
  }
  void step(const AdamWScalars& scalars, double norm_squared, int threads) {
    Context<cpu> ctx(threads);
    const auto aligned = [&](auto& values) {
      using Value = typename std::remove_reference_t<decltype(values)>::value_type;
      const auto copy = ctx.arena().tensor<Value>(values.size());
      std::copy(values.begin(), values.end(), copy.data);
      return copy;
    };
    AdamWTensors<W, F> tensors{aligned(weight), {}, aligned(gradient), aligned(m), aligned(v)};
    if constexpr (!std::is_same_v<W, F>) tensors.master = aligned(master);
    adamw_step(ctx, tensors, scalars, &norm_squared);
    const auto take = [](auto from, auto& to) { std::copy_n(from.data, from.size(), to.begin()); };
    take(tensors.weight, weight);
    take(tensors.m, m);
    take(tensors.v, v);
    if (tensors.master) take(tensors.master, master);
  }

  std::vector<W> weight;
  std::vector<F> master, gradient, m, v;
};

/// The definition, as in PyTorch: decay, moments, bias corrections, update.
struct Definition {
  template <class W, class F>
  Definition(const Problem<W, F>& p, const AdamWScalars& s, double norm) {
    const double clip = s.clip_norm > 0 ? std::min(1.0, s.clip_norm / (norm + 1e-6)) : 1;
    for (std::size_t i = 0; i < p.weight.size(); ++i) {
      const double g = clip * p.gradient[i];
      m.push_back(s.beta1 * p.m[i] + (1 - s.beta1) * g);
      v.push_back(s.beta2 * p.v[i] + (1 - s.beta2) * g * g);
      const double m_hat = m[i] / (1 - std::pow(s.beta1, s.step_number)),
                   v_hat = v[i] / (1 - std::pow(s.beta2, s.step_number)), decayed = 1 - s.learning_rate * s.decay;
      weight.push_back(p.master[i] * decayed - s.learning_rate * m_hat / (std::sqrt(v_hat) + s.eps));
    }
  }
  std::vector<double> weight, m, v;
};

template <class F>
void matches_definition(double tolerance) {
  for (const Index n : {1, 7, 33, 2048, 70'001})
    for (const AdamWScalars scalars :
         {AdamWScalars{0.1, 0.9, 0.95, 1e-8, 0.1, 1, 1}, AdamWScalars{0.1, 0.8, 0.999, 1e-3, 0, 0, 7},
          AdamWScalars{0.01, 0, 0.5, 1e-8, 0.5, 1e6, 1000}}) {
      Problem<F, F> problem(n);
      const double norm = 3.5;
      const Definition wanted(problem, scalars, norm);
      problem.step(scalars, norm * norm, 2);
      CHECK(relative_error(problem.weight, wanted.weight) < tolerance);
      CHECK(relative_error(problem.m, wanted.m) < tolerance);
      CHECK(relative_error(problem.v, wanted.v) < tolerance);
    }
}

}  // namespace

// A handful of roundings an element, and the cancellation of (1 - lr decay) p with the update: 10 epsilon.
TEST_CASE("adamw_step: matches its definition in double") { matches_definition<double>(2e-15); }
TEST_CASE("adamw_step: matches its definition in float") { matches_definition<float>(1.2e-6); }

TEST_CASE("adamw_step: a bf16 weight is the rounding of its master copy, which alone is stepped") {
  const AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 3};
  Problem<bf16, float> stored(5'000);
  Problem<float, float> exact(5'000);
  exact.weight = exact.master = stored.master;
  stored.step(scalars, 4, 2);
  exact.step(scalars, 4, 2);
  CHECK(stored.master == exact.weight);
  for (std::size_t i = 0; i < stored.weight.size(); ++i) REQUIRE(stored.weight[i].bits == bf16(stored.master[i]).bits);
}

TEST_CASE("adamw_step: bit-equal for any number of threads") {
  const AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 3};
  Problem<float, float> one(200'003), three(200'003);
  one.step(scalars, 4, 1);
  three.step(scalars, 4, 3);
  CHECK(one.weight == three.weight);
  CHECK(one.m == three.m);
  CHECK(one.v == three.v);
}

TEST_CASE("adamw_step: no clipping below the norm allowed, and none when it is switched off") {
  Problem<double, double> below(100), off(100), free(100);
  below.step({0.1, 0.9, 0.95, 1e-8, 0.1, 10, 1}, 4, 1);
  off.step({0.1, 0.9, 0.95, 1e-8, 0.1, 0, 1}, 1e9, 1);
  free.step({0.1, 0.9, 0.95, 1e-8, 0.1, 1e300, 1}, 1e9, 1);
  CHECK(below.weight == free.weight);
  CHECK(off.weight == free.weight);
}

namespace {

/// One element of a gradient is `large`, the others are 0, as is all that came before: clipped to a norm of 1.
template <class W, class F>
void clips_before_squaring(double large) {
  for (const Index n : {1, 3, 70'001}) {
    CAPTURE(large);
    Problem<W, F> problem(n);
    const auto at = static_cast<std::size_t>(n / 2);
    for (auto* values : {&problem.gradient, &problem.m, &problem.v}) std::fill(values->begin(), values->end(), F(0));
    problem.gradient[at] = static_cast<F>(large);
    const double norm = std::abs(static_cast<double>(static_cast<F>(large))), before = problem.master[at];
    const auto others = problem.master;
    problem.step({1e-2, 0.9, 0.95, 1e-8, 0, 1, 1}, norm * norm, 2);
    // Two roundings of float, and the 1e-6 of the clipping where the norm is small.
    CHECK(problem.m[at] == doctest::Approx(large < 0 ? -0.1 : 0.1).epsilon(2e-6));
    CHECK(problem.v[at] == doctest::Approx(0.05).epsilon(4e-6));
    const double now = std::is_same_v<W, F> ? static_cast<double>(static_cast<float>(problem.weight[at]))
                                            : static_cast<double>(problem.master[at]);
    CHECK(now - before == doctest::Approx(large < 0 ? 1e-2 : -1e-2).epsilon(1e-4));  // weights near 1, in float
    for (std::size_t i = 0; i < others.size(); ++i)
      if (i != at) REQUIRE(static_cast<float>(problem.weight[i]) == static_cast<float>(static_cast<W>(others[i])));
  }
}

}  // namespace

TEST_CASE("adamw_step: a gradient is clipped before it is squared, whatever its size") {
  for (const double large : {3., 1e10, -1.8e19, 1.9e19, 1e20, -1e30, 3e38}) {
    clips_before_squaring<float, float>(large);
    clips_before_squaring<bf16, float>(large);
    clips_before_squaring<double, double>(large);
  }
  for (const double large : {1e100, -1e150}) clips_before_squaring<double, double>(large);
}

TEST_CASE("adamw_step: many gradients near the largest float, whose clip is below the least") {
  constexpr Index n = 10'000;
  Problem<float, float> problem(n);
  std::fill(problem.gradient.begin(), problem.gradient.end(), 3e38f);
  std::fill(problem.m.begin(), problem.m.end(), 0.f);
  std::fill(problem.v.begin(), problem.v.end(), 0.f);
  const double norm = 100 * static_cast<double>(3e38f);
  problem.step({1e-2, 0.9, 0.95, 1e-8, 0, 1, 1}, norm * norm, 2);
  for (Index i = 0; i < n; i += 999) {
    const auto at = static_cast<std::size_t>(i);
    CHECK(problem.m[at] == doctest::Approx(0.1 / 100).epsilon(1e-6));
    CHECK(problem.v[at] == doctest::Approx(0.05 / 1e4).epsilon(2e-6));
  }
}

TEST_CASE("adamw_step: a norm that is not finite, or whose square v could not hold, changes nothing") {
  constexpr double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& bad : {std::pair{0., nan}, {0., inf}, {1., nan}, {1., inf}, {0., 2e19}, {1e20, 1e25}}) {
    const double clip = bad.first, norm = bad.second;
    CAPTURE(clip);
    CAPTURE(norm);
    Problem<float, float> problem(5'000), as_it_was(5'000);
    Problem<bf16, float> stored(5'000), stored_was(5'000);
    const AdamWScalars scalars{1e-2, 0.9, 0.95, 1e-8, 0.1, clip, 3};
    problem.step(scalars, norm * norm, 2);
    stored.step(scalars, norm * norm, 2);
    CHECK((problem.weight == as_it_was.weight && problem.m == as_it_was.m && problem.v == as_it_was.v));
    CHECK((stored.master == stored_was.master && stored.m == stored_was.m && stored.v == stored_was.v));
  }
  Problem<double, double> wide(10), wide_was(10);
  wide.step({1e-2, 0.9, 0.95, 1e-8, 0.1, 0, 3}, 4e38, 1);  // what float could not hold
  CHECK(wide.weight != wide_was.weight);
}

TEST_CASE("sum_of_squares: summed in double, bit-equal for any number of threads") {
  for (const Index n : {0, 1, 5, 16'384, 300'007}) {
    std::vector<float> values = random_values<float>(n, 9);
    double wanted = 0;
    for (const float v : values) wanted += static_cast<double>(v) * static_cast<double>(v);
    double one = -1, three = -1;
    Context<cpu> ctx1(1), ctx3(3);
    sum_of_squares(ctx1, Vector<float>(values.data(), n), &one);
    sum_of_squares(ctx3, Vector<float>(values.data(), n), &three);
    CHECK(one == three);
    CHECK(std::abs(one - wanted) <= 1e-12 * wanted);  // 3e5 additions in double, each 1e-16, in another order
  }
  std::vector<float> large(1000, 1e30f);  // whose squares are beyond float
  double sum = 0;
  Context<cpu> ctx;
  sum_of_squares(ctx, Vector<float>(large.data(), 1000), &sum);
  CHECK(sum == doctest::Approx(1e63));
}
