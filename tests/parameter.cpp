// SPDX-License-Identifier: MIT
#include <zamba/parameter.hpp>

#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/block/check.hpp>

using namespace zamba;

namespace {

/// A block that holds two of another.
struct Part {
  template <class W, class F>
  struct Parameters {
    Matrix<W> weight;
    Vector<F> bias;
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("weight", p.weight, {{3, 4}}, normal(0.5));
    visit("bias", p.bias, {{3}}, constant(2), Decay::no);
  }
};
struct Whole {
  template <class W, class F>
  struct Parameters {
    Part::Parameters<W, F> parts[2];
    Vector<F> gain;
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    for (Index i = 0; i < 2; ++i) Part::visit_parameters(p.parts[i], visit.scope("parts", i));
    visit("gain", p.gain, {{5}}, uniform(1));
  }
};

/// Two parts of one residual stream, each with a product inside and two that add to the stream.
struct TwoResidual {
  template <class W, class F>
  struct Parameters {
    Matrix<W> weights[2][3];
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    for (Index i = 0; i < 2; ++i) {
      const auto part = visit.scope("parts", i);
      part("inside", p.weights[i][0], {{9, 9}}, fan_in(9));
      part("first", p.weights[i][1], {{9, 9}}, residual_fan_in(9));
      part("second", p.weights[i][2], {{9, 9}}, into_residual(fan_in(9)));
    }
  }
};

/// Begins a stream of its own, to which 16 products add.
struct OwnStream : TwoResidual {
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    TwoResidual::visit_parameters(p, visit.stream(16));
  }
};
/// The same with a mistake in what it lists there.
struct WrongStream : Part {
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit.stream(16)("weight", p.weight, {{3}}, normal(0.5));
  }
};

std::vector<double> drawn(Initializer initializer, Index count, Index cols) {
  Random random(Seed{1});
  std::vector<double> values;
  for (Index i = 0; i < count; ++i) values.push_back(initializer(random, i, cols));
  return values;
}

}  // namespace

TEST_SUITE("parameter") {
  TEST_CASE("visiting gives whole names, shapes and decay, and counts at compile time") {
    static_assert(parameter_count<Whole> == 2 * 15 + 5);
    Whole::Parameters<float, double> parameters;
    std::vector<std::string> names, without_decay;
    Index size = 0;
    visit_parameters<Whole>(parameters, [&](const Name& name, auto&, auto shape, Initializer, Decay decay) {
      names.push_back(name.str());
      if (decay == Decay::no) without_decay.push_back(name.str());
      size += shape.size();
    });
    CHECK(names ==
          std::vector<std::string>{"parts.0.weight", "parts.0.bias", "parts.1.weight", "parts.1.bias", "gain"});
    CHECK(without_decay == std::vector<std::string>{"parts.0.bias", "parts.1.bias"});
    CHECK(size == 35);
  }

  TEST_CASE("initial values") {
    CHECK(drawn(constant(2), 2, 1) == std::vector<double>{2, 2});
    const auto logs = drawn(log_arange(), 6, 3);
    for (Index i = 0; i < 6; ++i) CHECK(logs[static_cast<std::size_t>(i)] == std::log(i % 3 + 1));
    double sum = 0, square = 0, low = 1, high = -1;
    for (const double value : drawn(normal(0.5), 20000, 10)) sum += value, square += value * value;
    CHECK(std::abs(sum / 20000) < 5 * 0.5 / std::sqrt(20000));
    CHECK(std::abs(square / 20000 - 0.25) < 5 * 0.25 * 1.42 / std::sqrt(20000));
    for (const double value : drawn(uniform(0.25), 20000, 10)) low = std::min(low, value), high = std::max(high, value);
    CHECK(low >= -0.25);
    CHECK(low < -0.249);
    CHECK(high < 0.25);
    CHECK(high > 0.249);
    CHECK(drawn(fan_in(16), 100, 10) == drawn(uniform(0.25), 100, 10));
    CHECK(drawn(fan_in(16, 0.5), 100, 10) == drawn(normal(0.5), 100, 10));
    // softplus of the dt bias lies in [0.001, 0.1], half of it below the geometric mean 0.01.
    int below = 0;
    for (const double bias : drawn(inverse_softplus_dt(), 20000, 10)) {
      const double dt = std::log1p(std::exp(bias));
      CHECK(dt > 0.001 * (1 - 1e-9));
      CHECK(dt < 0.1 * (1 + 1e-9));
      below += dt < 0.01;
    }
    CHECK(std::abs(below - 10000) < 5 * 71);
  }

  TEST_CASE("products that add to the residual stream are scaled by the root of how many do") {
    static_assert(residual_writes<Whole> == 0 && residual_writes<TwoResidual> == 4);
    std::vector<double> values;
    const auto draw = [&](const Name&, auto&, auto shape, Initializer initializer, Decay) {
      Random random(Seed{1});
      values.push_back(initializer(random, 0, shape.extent[1]) / drawn(fan_in(9), 1, 9)[0]);
    };
    TwoResidual::Parameters<float, float> parameters;
    visit_parameters<TwoResidual>(parameters, draw);
    CHECK(values == std::vector<double>{1, 1, 1, 1, 1, 1});
    values.clear();
    TwoResidual::visit_parameters(parameters, ParameterVisitor(draw).stream(residual_writes<TwoResidual>));
    CHECK(values == std::vector<double>{1, 0.5, 0.5, 1, 0.5, 0.5});
    values.clear();
    OwnStream::visit_parameters(parameters, ParameterVisitor(draw).stream(residual_writes<TwoResidual>));
    CHECK(values == std::vector<double>{1, 0.25, 0.25, 1, 0.25, 0.25});
    CHECK(drawn(residual_fan_in(16, 0.5), 100, 10) == drawn(normal(0.5), 100, 10));
  }

  TEST_CASE("the compiler's check of a block goes on behind the beginning of a stream") {
    using zamba::detail::check_parameters, zamba::detail::Problem;
    static_assert(check_parameters<OwnStream>().problem == Problem::none);
    static_assert(check_parameters<WrongStream>().problem == Problem::parameter_extents);
  }
}
