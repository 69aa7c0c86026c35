// SPDX-License-Identifier: MIT
// adamw_step against a plain loop in double, and the sum of squares.
#include <zamba/ops/adamw_step.hpp>

#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <tests/support/strided.hpp>

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
