// SPDX-License-Identifier: MIT
#include <algorithm>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/linear.hpp>

#include "../support/strided.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

/// Rounding of sums of up to a thousand products of random sign: sqrt(1000) epsilon, with room for the sums' own
/// growth.
template <class A>
constexpr double rounding = std::is_same_v<A, double> ? 1e-14 : 5e-6;

struct Extents {
  Index tokens, in, out;
};

template <class A, class W>
void check_forward(Extents e, Index gap, bool with_bias, bool with_residual, int threads) {
  CAPTURE(e.tokens);
  CAPTURE(e.in);
  CAPTURE(e.out);
  CAPTURE(gap);
  CAPTURE(threads);
  Context<cpu> ctx(threads);
  Strided<A> x(e.tokens, e.in, gap, 1), residual(e.tokens, e.out, gap, 3), y(e.tokens, e.out, gap, 4);
  Strided<W> weight(e.out, e.in, gap, 2);
  auto bias = random_values<A>(e.out, 5);
  const auto before = y.values;
  linear(ctx, x.view, weight.view, y.view, with_residual ? residual.view : Matrix<A>{},
         with_bias ? Vector<A>(bias.data(), e.out) : Vector<A>{});
  const double error = relative_error(y.view, [&](Index t, Index o) {
    double sum = with_bias ? static_cast<double>(bias[static_cast<std::size_t>(o)]) : 0;
    if (with_residual) sum += static_cast<double>(residual.view(t, o));
    for (Index k = 0; k < e.in; ++k)
      sum += static_cast<double>(x.view(t, k)) * static_cast<double>(static_cast<A>(weight.view(o, k)));
    return sum;
  });
  CHECK(error <= rounding<A>);
  // What lies between the rows of a strided y is not ours.
  bool untouched = true;
  for (Index t = 0; t < e.tokens; ++t)
    for (Index j = 0; j < gap; ++j) {
      const auto at = static_cast<std::size_t>(t * (e.out + gap) + (j < gap / 2 ? j : e.out + j));
      untouched = untouched && y.values[at] == before[at];
    }
  CHECK(untouched);
}

}  // namespace

TEST_CASE_TEMPLATE("linear: every small number of tokens, odd extents, bias, residual, strides", A, float, double) {
  for (Index n = 0; n <= 40; ++n) {
    check_forward<A, A>({n, 37, 23}, n % 3, n % 2, n % 5 < 2, 2);
    check_forward<A, A>({n, 64, 129}, 4, n % 2 == 0, n % 3 == 0, 1);
    check_forward<A, A>({n, 1, 1}, 0, false, true, 2);
  }
}

TEST_CASE("linear: bf16 weights, every small number of tokens") {
  for (Index n = 0; n <= 40; ++n) {
    check_forward<float, bf16>({n, 37, 23}, n % 3, n % 2, n % 5 < 2, 2);
    check_forward<float, bf16>({n, 96, 130}, 3, n % 2 == 0, n % 3 == 0, 1);
  }
}

TEST_CASE_TEMPLATE("linear: sizes of more than one tile", A, float, double) {
  check_forward<A, A>({300, 257, 801}, 2, true, true, 2);
  check_forward<A, A>({1030, 130, 5}, 1, false, false, 2);
  check_forward<A, A>({7, 1000, 2050}, 1, true, false, 2);
}

TEST_CASE("linear: sizes of more than one tile, bf16 weights") {
  check_forward<float, bf16>({300, 257, 801}, 2, true, true, 2);
}

TEST_CASE_TEMPLATE("linear: the residual may be y itself", A, float, double) {
  for (Index n : {3, 20, 300}) {
    Context<cpu> ctx(2);
    Strided<A> x(n, 40, 2, 1), weight(50, 40, 0, 2), y(n, 50, 2, 3);
    const auto before = y.values;
    linear(ctx, x.view, weight.view, y.view, y.view);
    CHECK(relative_error(y.view, [&](Index t, Index o) {
            double sum = static_cast<double>(before[static_cast<std::size_t>(t * 52 + 1 + o)]);
            for (Index k = 0; k < 40; ++k)
              sum += static_cast<double>(x.view(t, k)) * static_cast<double>(weight.view(o, k));
            return sum;
          }) <= rounding<A>);
  }
}

TEST_CASE_TEMPLATE("linear: a row is the same whichever few rows it is computed with", A, float, double) {
  Context<cpu> ctx(2);
  Strided<A> x(32, 203, 0, 1), weight(77, 203, 0, 2), together(32, 77, 0, 3), alone(1, 77, 0, 4);
  for (Index n = 1; n <= 32; ++n) {
    linear(ctx, x.view.slice(0, n), weight.view, together.view.slice(0, n));
    for (Index t = 0; t < n; ++t) {
      linear(ctx, x.view.slice(t, 1), weight.view, alone.view);
      CHECK(std::equal(alone.values.begin(), alone.values.end(), &together.view(t, 0)));
    }
  }
}

TEST_CASE_TEMPLATE("linear: bf16 weights give what their values as float give, bit by bit", Gap,
                   std::integral_constant<int, 0>, std::integral_constant<int, 5>) {
  for (Index n : {1, 2, 7, 32, 33, 300}) {
    CAPTURE(n);
    Context<cpu> ctx(2);
    Strided<bf16> weight(1100, 210, Gap::value, 2);
    std::vector<float> widened(weight.values.begin(), weight.values.end());
    Matrix<float> wide(widened.data(), 1100, 210 + Gap::value);
    wide = wide.columns(Gap::value / 2, 210);
    Strided<float> x(n, 210, 0, 1), a(n, 1100, 0, 3), b(n, 1100, 0, 4), d_a(n, 210, 0, 5), d_b(n, 210, 0, 6);
    linear(ctx, x.view, weight.view, a.view);
    linear(ctx, x.view, wide, b.view);
    CHECK(a.values == b.values);
    linear_backward(ctx, a.view, x.view, weight.view, d_a.view, Accumulate::no, {});
    linear_backward(ctx, a.view, x.view, wide, d_b.view, Accumulate::no, {});
    CHECK(d_a.values == d_b.values);
  }
}

TEST_CASE_TEMPLATE("linear: bit-equal on one, two and three threads", A, float, double) {
  for (Extents e : {Extents{1, 700, 900}, Extents{9, 700, 301}, Extents{40, 300, 900}, Extents{700, 129, 501}}) {
    CAPTURE(e.tokens);
    std::vector<std::vector<A>> first;
    for (int threads : {1, 2, 3}) {
      Context<cpu> ctx(threads);
      Strided<A> x(e.tokens, e.in, 0, 1), weight(e.out, e.in, 0, 2), y(e.tokens, e.out, 0, 3),
          d_x(e.tokens, e.in, 0, 4);
      Strided<A> d_weight(e.out, e.in, 0, 5), d_bias(1, e.out, 0, 6);
      linear(ctx, x.view, weight.view, y.view);
      linear_backward(ctx, y.view, x.view, weight.view, d_x.view, Accumulate::yes, d_weight.view, d_bias.view[0]);
      std::vector<std::vector<A>> all = {y.values, d_x.values, d_weight.values, d_bias.values};
      if (first.empty()) first = all;
      CHECK(all == first);
    }
  }
}

TEST_CASE_TEMPLATE("linear: gradients are those of the plain loops, added where they should be", A, float, double) {
  for (Extents e :
       {Extents{0, 5, 6}, Extents{1, 33, 20}, Extents{5, 20, 33}, Extents{300, 130, 41}, Extents{40, 41, 1030}})
    for (bool accumulate : {false, true}) {
      CAPTURE(e.tokens);
      CAPTURE(accumulate);
      Context<cpu> ctx(2);
      Strided<A> x(e.tokens, e.in, 2, 1), weight(e.out, e.in, 3, 2), d_y(e.tokens, e.out, 1, 3),
          d_x(e.tokens, e.in, 2, 4);
      Strided<A> d_weight(e.out, e.in, 4, 5), d_bias(1, e.out, 0, 6);
      Strided<A> d_x0(e.tokens, e.in, 2, 4), d_weight0(e.out, e.in, 4, 5), d_bias0(1, e.out, 0, 6);
      linear_backward(ctx, d_y.view, x.view, weight.view, d_x.view, accumulate ? Accumulate::yes : Accumulate::no,
                      d_weight.view, d_bias.view[0]);
      CHECK(relative_error(d_x.view, [&](Index t, Index i) {
              double sum = accumulate ? static_cast<double>(d_x0.view(t, i)) : 0;
              for (Index o = 0; o < e.out; ++o)
                sum += static_cast<double>(d_y.view(t, o)) * static_cast<double>(weight.view(o, i));
              return sum;
            }) <= rounding<A>);
      CHECK(relative_error(d_weight.view, [&](Index o, Index i) {
              double sum = static_cast<double>(d_weight0.view(o, i));
              for (Index t = 0; t < e.tokens; ++t)
                sum += static_cast<double>(d_y.view(t, o)) * static_cast<double>(x.view(t, i));
              return sum;
            }) <= rounding<A>);
      CHECK(relative_error(d_bias.view, [&](Index, Index o) {
              double sum = static_cast<double>(d_bias0.view(0, o));
              for (Index t = 0; t < e.tokens; ++t) sum += static_cast<double>(d_y.view(t, o));
              return sum;
            }) <= rounding<A>);
    }
}

TEST_CASE("linear: gradients agree with finite differences") {
  // The loss sum(c * y) is linear in each argument, so central differences are exact but for rounding.
  Context<cpu> ctx(1);
  Strided<double> x(3, 7, 0, 1), weight(5, 7, 0, 2), bias(1, 5, 0, 3), cotangent(3, 5, 0, 4), y(3, 5, 0, 5);
  std::vector<double> d_x(21), d_weight(35), d_bias(5);
  linear_backward(ctx, cotangent.view, x.view, weight.view, Matrix<double>(d_x.data(), 3, 7), Accumulate::no,
                  Matrix<double>(d_weight.data(), 5, 7), Vector<double>(d_bias.data(), 5));
  const auto loss = [&] {
    linear(ctx, x.view, weight.view, y.view, {}, bias.view[0]);
    double sum = 0;
    for (std::size_t i = 0; i < y.values.size(); ++i) sum += cotangent.values[i] * y.values[i];
    return sum;
  };
  CHECK(relative_error(d_x, finite_differences(x.values, 1e-3, loss)) <= 1e-10);
  CHECK(relative_error(d_weight, finite_differences(weight.values, 1e-3, loss)) <= 1e-10);
  CHECK(relative_error(d_bias, finite_differences(bias.values, 1e-3, loss)) <= 1e-10);
}

TEST_CASE("linear: the second time, scratch memory grows no more") {
  Context<cpu> ctx(2);
  Strided<bf16> weight(500, 200, 0, 2);
  Strided<float> x(64, 200, 0, 1), y(64, 500, 0, 3);
  linear(ctx, x.view, weight.view, y.view);
  const std::size_t capacity = ctx.arena().capacity();
  linear(ctx, x.view, weight.view, y.view);
  CHECK(ctx.arena().capacity() == capacity);
  CHECK(ctx.arena().mark().used == 0);
}
