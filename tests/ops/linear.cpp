// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/linear.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
};

/// Rounding of sums of up to a thousand products of random sign: sqrt(1000) epsilon, with room for the sums' own
/// growth. Outputs in bf16 are rounded to 8 bits, at most 2^-8 of each, twice where a bias joins after the product.
template <class A>
constexpr double rounding = std::is_same_v<A, double> ? 1e-14
                            : std::is_same_v<A, bf16> ? 2 * 0x1p-9
                                                      : 5e-6;

struct Extents {
  Index tokens, in, out;
};

template <class Device, class A, class W>
void check_forward(Extents e, Index gap, bool with_bias, bool with_residual, int threads, bool in_place = false) {
  using F = compute_t<A>;
  CAPTURE(e.tokens);
  CAPTURE(e.in);
  CAPTURE(e.out);
  CAPTURE(gap);
  CAPTURE(threads);
  auto ctx = new_context<Device>(threads);
  const PaddedMatrix<Device, A> x(normal_values(e.tokens * e.in, 1), e.tokens, gap);
  const PaddedMatrix<Device, W> weight(normal_values(e.out * e.in, 2), e.out, gap);
  const PaddedMatrix<Device, A> residual(normal_values(e.tokens * e.out, 3), e.tokens, gap);
  const Array<Device, F> bias(normal_values(e.out, 5));
  const Index width = e.out + gap;
  const Array<Device, A> all(normal_values(e.tokens * width, 4));  // y is a slice of its columns
  const Matrix<A> y = all.view(e.tokens, width).columns(gap / 2, e.out);
  const Values before = all.values();
  linear(ctx, x.view(), weight.view(), y,
         in_place        ? y
         : with_residual ? residual.view()
                         : Matrix<A>{},
         with_bias ? bias.view(e.out) : Vector<F>{});
  const Values after = all.values(), xs = x.values(), ws = weight.values(), rs = residual.values(), bs = bias.values();
  Values ours, wanted;
  bool untouched = true;  // what lies between the rows of a strided y is not ours
  for (Index t = 0; t < e.tokens; ++t)
    for (Index j = 0; j < width; ++j) {
      const Index o = j - gap / 2;
      const auto at = static_cast<std::size_t>(t * width + j);
      if (o < 0 || o >= e.out) {
        untouched = untouched && after[at] == before[at];
        continue;
      }
      double sum = with_bias ? bs[static_cast<std::size_t>(o)] : 0;
      if (in_place)
        sum += before[at];
      else if (with_residual)
        sum += rs[static_cast<std::size_t>(t * e.out + o)];
      for (Index k = 0; k < e.in; ++k)
        sum += xs[static_cast<std::size_t>(t * e.in + k)] * ws[static_cast<std::size_t>(o * e.in + k)];
      ours.push_back(after[at]);
      wanted.push_back(sum);
    }
  CHECK(relative_error(ours, wanted) <= rounding<A>);
  CHECK(untouched);
}

/// Heads side by side in the rows of d_y and x, which lie `gap` elements apart.
template <class Where>
void check_backward(Extents e, Index heads, Index gap, Accumulate accumulate) {
  using Device = typename Where::device;
  using A = typename Where::type;
  using F = compute_t<A>;
  CAPTURE(e.tokens);
  CAPTURE(e.in);
  CAPTURE(e.out);
  CAPTURE(gap);
  const bool adds = accumulate == Accumulate::yes;
  CAPTURE(adds);
  auto ctx = new_context<Device>(2);
  const Index wide_in = heads * e.in, wide_out = heads * e.out;
  const auto activations = [&](Index width, std::uint64_t stream) {
    return PaddedMatrix<Device, A>::of_width(normal_values(e.tokens * width, stream), width, gap);
  };
  const auto x = activations(wide_in, 1), d_y = activations(wide_out, 2), sum_x = activations(wide_in, 3);
  const auto unset_x =
      PaddedMatrix<Device, A>::of_width(nans(static_cast<std::size_t>(e.tokens * wide_in)), wide_in, gap);
  const auto& d_x = adds ? sum_x : unset_x;
  const PaddedMatrix<Device, A> weight(normal_values(wide_out * e.in, 4), wide_out, gap);
  const PaddedMatrix<Device, F> d_weight(normal_values(wide_out * e.in, 5), wide_out, gap);
  const Array<Device, F> d_bias(normal_values(wide_out, 6));
  Values wanted_x = d_x.values(), wanted_w = d_weight.values(), wanted_b = d_bias.values();
  if (!adds) std::fill(wanted_x.begin(), wanted_x.end(), 0);
  const Values xs = x.values(), ws = weight.values(), d_ys = d_y.values();
  if (heads == 1)
    linear_backward(ctx, d_y.view(), x.view(), weight.view(), d_x.view(), accumulate, d_weight.view(),
                    d_bias.view(wide_out));
  else
    linear_heads_backward(ctx, split_heads(d_y.view(), heads), split_heads(x.view(), heads), weight.parts(heads),
                          split_heads(d_x.view(), heads), accumulate, d_weight.parts(heads));
  for (Index t = 0; t < e.tokens; ++t)
    for (Index o = 0; o < wide_out; ++o) {
      const double d = d_ys[static_cast<std::size_t>(t * wide_out + o)];
      if (heads == 1) wanted_b[static_cast<std::size_t>(o)] += d;
      for (Index i = 0; i < e.in; ++i) {
        const auto at = static_cast<std::size_t>(t * wide_in + o / e.out * e.in + i);
        wanted_x[at] += d * ws[static_cast<std::size_t>(o * e.in + i)];
        wanted_w[static_cast<std::size_t>(o * e.in + i)] += d * xs[at];
      }
    }
  CHECK(relative_error(d_x.values(), wanted_x) <= rounding<A>);
  // Tensor cores cut a sum off where they add 16 products to it, by at most 2^-23.
  const double cut = std::is_same_v<A, bf16> ? 0x1p-27 * static_cast<double>(e.tokens) : 0;
  CHECK(relative_error(d_weight.values(), wanted_w) <= rounding<F> + cut);
  CHECK(relative_error(d_bias.values(), wanted_b) <= rounding<F>);
}

/// Rows [first, first + count) of y for the same rows of x.
template <class Where>
Values rows_of_product(const Array<typename Where::device, typename Where::type>& x,
                       const Array<typename Where::device, typename Where::type>& weight, Index in, Index out,
                       Index first, Index count) {
  using A = typename Where::type;
  auto ctx = new_context<typename Where::device>(2);
  const Array<typename Where::device, A> y(nans(static_cast<std::size_t>(count * out)));
  linear(ctx, x.view(first + count, in).slice(first, count), weight.view(out, in), y.view(count, out));
  return y.values();
}

}  // namespace

TEST_CASE_TEMPLATE("linear: every small number of tokens, odd extents, bias, residual, strides", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  for (Index n = 1; n <= 40; ++n) {
    check_forward<Device, A, A>({n, 37, 23}, n % 3, n % 2, n % 5 < 2, 2);
    check_forward<Device, A, A>({n, 64, 129}, 4, n % 2 == 0, n % 3 == 0, 1);
    check_forward<Device, A, A>({n, 1, 1}, 0, false, true, 2);
  }
}

TEST_CASE_TEMPLATE("linear: rows of whole pieces of 16 bytes, at the edges of the tiles of tensor cores", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  // Stages have 64 columns, blocks 128 rows, and four stages are the least for a part of the columns.
  for (const Index n : {1, 5, 8, 9, 16, 17, 32, 33, 64, 65}) {
    const bool odd = n % 2;
    check_forward<Device, A, A>({n, 8, 8}, 8, odd, !odd, 2);
    check_forward<Device, A, A>({n, 72, 130}, 8, !odd, odd, 2);
    check_forward<Device, A, A>({n, 200, 127}, 8, odd, odd, 2);
  }
  // Few tokens: long rows are for a block, and of several loads a thread.
  for (Index n = 1; n <= 9; ++n) {
    check_forward<Device, A, A>({n, 776, 41}, 8, n % 2, n % 3 == 0, 2);
    check_forward<Device, A, A>({n, 4104, 9}, n % 2 * 8, n % 2 == 0, n % 3 == 1, 2);
    check_forward<Device, A, A>({n, 771, 10}, 1, true, false, 2);
  }
  for (const Index n : {9, 32}) {
    check_forward<Device, A, A>({n, 504, 136}, 16, true, true, 2);   // eight stages, two parts
    check_forward<Device, A, A>({n, 1000, 24}, 16, true, false, 2);  // four parts
    check_forward<Device, A, A>({n, 968, 25}, 8, true, true, 2, true);
    check_forward<Device, A, A>({n, 1032, 9}, 24, false, true, 2);
  }
}

TEST_CASE_TEMPLATE("linear: of no tokens nothing is written", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  auto ctx = new_context<Device>(2);
  const Array<Device, A> x(normal_values(8, 1)), weight(normal_values(64, 2)), y(normal_values(8, 3));
  const Values before = y.values();
  linear(ctx, x.view(0, 8), weight.view(8, 8), y.view(0, 8));
  linear_heads(ctx, x.view(0, 2, 4), weight.view(2, 8, 4), y.view(0, 2, 8));
  CHECK(y.values() == before);
}

TEST_CASE("linear: bf16 weights, every small number of tokens") {
  for (Index n = 1; n <= 40; ++n) {
    check_forward<cpu, float, bf16>({n, 37, 23}, n % 3, n % 2, n % 5 < 2, 2);
    check_forward<cpu, float, bf16>({n, 96, 130}, 3, n % 2 == 0, n % 3 == 0, 1);
  }
}

TEST_CASE_TEMPLATE("linear: sizes of more than one tile", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  check_forward<Device, A, A>({300, 257, 801}, 2, true, true, 2);
  check_forward<Device, A, A>({1030, 130, 5}, 1, false, false, 2);
  check_forward<Device, A, A>({7, 1000, 2050}, 1, true, false, 2);
}

TEST_CASE("linear: sizes of more than one tile, bf16 weights") {
  check_forward<cpu, float, bf16>({300, 257, 801}, 2, true, true, 2);
}

TEST_CASE_TEMPLATE("linear: the residual may be y itself", Where, ZAMBA_TEST_ON) {
  using A = typename Where::type;
  for (Index n : {3, 20, 300})
    for (Index gap : {2, 8}) check_forward<typename Where::device, A, A>({n, 40, 56}, gap, false, true, 2, true);
}

TEST_CASE_TEMPLATE("linear: long rows that begin at multiples of 16 bytes, and end between two of them", Where,
                   ZAMBA_TEST_ON) {
  using A = typename Where::type;
  check_forward<typename Where::device, A, A>({40, 519, 1031}, 17, false, false, 2);
  check_forward<typename Where::device, A, A>({40, 519, 1031}, 17, true, true, 2);
}

TEST_CASE_TEMPLATE("linear: a row is the same whichever few rows it is computed with", Where, ZAMBA_TEST_ON) {
  using A = typename Where::type;
  constexpr bool on_cpu = std::is_same_v<typename Where::device, cpu>;
  const Index few = on_cpu ? 32 : std::is_same_v<A, bf16> ? 4 : 8;
  for (const Index in : {203, 208, 771, 776}) {
    const Array<typename Where::device, A> x(normal_values(32 * in, 1)), weight(normal_values(77 * in, 2));
    const Values together = rows_of_product<Where>(x, weight, in, 77, 0, few);
    for (Index n = 1; n < few; ++n) {
      const Index first = few - n;
      const Values some = rows_of_product<Where>(x, weight, in, 77, first, n);
      CHECK(std::equal(some.begin(), some.end(), together.begin() + first * 77));
    }
  }
  if constexpr (!on_cpu && std::is_same_v<A, bf16>) {
    // Five rows or more, through kernels for 16 and 32, with columns in one part and in several.
    for (const Index in : {208, 776}) {
      const Array<typename Where::device, A> x(normal_values(32 * in, 1)), weight(normal_values(77 * in, 2));
      const Values together = rows_of_product<Where>(x, weight, in, 77, 0, 32);
      for (const Index n : {5, 8, 16, 17, 31}) {
        const Index first = 32 - n;
        const Values some = rows_of_product<Where>(x, weight, in, 77, first, n);
        CHECK(std::equal(some.begin(), some.end(), together.begin() + first * 77));
      }
    }
    // Of weights of 2^23 elements or more, 3 rows to 32.
    const Index in = 1032, out = 8200;
    const Array<typename Where::device, A> x(normal_values(32 * in, 1)), weight(normal_values(out * in, 2));
    const Values together = rows_of_product<Where>(x, weight, in, out, 0, 32);
    for (const Index n : {3, 4, 5, 17}) {
      const Index first = 32 - n;
      const Values some = rows_of_product<Where>(x, weight, in, out, first, n);
      CHECK(std::equal(some.begin(), some.end(), together.begin() + first * out));
    }
    const Values two = rows_of_product<Where>(x, weight, in, out, 29, 2);
    const Values one = rows_of_product<Where>(x, weight, in, out, 30, 1);
    CHECK(std::equal(one.begin(), one.end(), two.begin() + out));
    check_forward<typename Where::device, A, A>({3, in, out}, 8, true, true, 2);
  }
}

TEST_CASE_TEMPLATE("linear: what other rows hold, not even a NaN, changes a row", Where, ZAMBA_TEST_ON) {
  const Index in = 264, out = 40;
  for (const Index n : {2, 9, 40}) {
    Values values = normal_values(n * in, 1);
    const Array<typename Where::device, typename Where::type> weight(normal_values(out * in, 2)), x(values);
    std::fill(values.begin() + in, values.begin() + 2 * in, std::nan(""));
    const Array<typename Where::device, typename Where::type> poisoned(values);
    const Values good = rows_of_product<Where>(x, weight, in, out, 0, n);
    const Values bad = rows_of_product<Where>(poisoned, weight, in, out, 0, n);
    bool same = true;
    for (Index t = 0; t < n; ++t)
      for (Index o = 0; o < out; ++o) {
        const auto at = static_cast<std::size_t>(t * out + o);
        same = same && (t == 1 ? std::isnan(bad[at]) : bad[at] == good[at]);
      }
    CHECK(same);
  }
}

TEST_CASE_TEMPLATE("linear: each product of a row of them reads what the one before wrote", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  // Two buffers in turn, so that a product that begins too early reads or overwrites what is still in use.
  const Index wide = 1544, narrow = 40, products = 40;
  Values weights = normal_values(narrow * wide, 1);
  for (double& value : weights) value /= std::sqrt(std::sqrt(static_cast<double>(narrow * wide)));  // values keep size
  const Array<Device, A> down(weights), up(weights);
  for (const Index n : {1, 2, 3, 8, 40}) {
    CAPTURE(n);
    const Values start = normal_values(n * wide, 3);
    const auto row_of_products = [&](bool wait) {
      auto ctx = new_context<Device>(2);
      const Array<Device, A> a(start), b(nans(static_cast<std::size_t>(n * narrow)));
      const auto product = [&](const Matrix<A>& from, const Array<Device, A>& weight, Matrix<A> to) {
        linear(ctx, from, weight.view(to.cols(), from.cols()), to);
        if constexpr (!std::is_same_v<Device, cpu>)
          if (wait) ctx.synchronize();
      };
      for (Index i = 0; i < products; ++i) {
        product(a.view(n, wide), down, b.view(n, narrow));
        product(b.view(n, narrow), up, a.view(n, wide));
      }
      return a.values();
    };
    const Values waited = row_of_products(true);
    CHECK(std::all_of(waited.begin(), waited.end(), [](double value) { return !std::isnan(value); }));
    CHECK(row_of_products(false) == waited);
  }
}

TEST_CASE_TEMPLATE("linear_heads: every head is its own product", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  for (const Index n : {1, 8, 9, 33, 64, 70})
    for (const Index in : {24, 19}) {
      const Index heads = 3, out = 21;
      CAPTURE(n);
      CAPTURE(in);
      const Values xs = normal_values(n * heads * in, 1), ws = normal_values(heads * out * in, 2);
      auto ctx = new_context<Device>(2);
      const Array<Device, A> x(xs), weight(ws), y(nans(static_cast<std::size_t>(n * heads * out)));
      linear_heads(ctx, x.view(n, heads, in), weight.view(heads, out, in), y.view(n, heads, out));
      const Values x_rounded = x.values(), w_rounded = weight.values(), got = y.values();
      Values wanted;
      for (Index t = 0; t < n; ++t)
        for (Index h = 0; h < heads; ++h)
          for (Index o = 0; o < out; ++o) {
            double sum = 0;
            for (Index k = 0; k < in; ++k)
              sum += x_rounded[static_cast<std::size_t>((t * heads + h) * in + k)] *
                     w_rounded[static_cast<std::size_t>((h * out + o) * in + k)];
            wanted.push_back(sum);
          }
      CHECK(zamba::testing::relative_error(got, wanted) <= rounding<A>);
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

TEST_CASE_TEMPLATE("linear: gradients are those of the plain loops, added where they should be", Where, ZAMBA_TEST_ON) {
  for (const Extents e : {Extents{0, 5, 6}, Extents{1, 33, 20}, Extents{5, 20, 33}, Extents{64, 72, 40},
                          Extents{300, 130, 41}, Extents{40, 41, 1030}, Extents{4099, 8, 24}, Extents{4099, 3, 5}})
    for (const Accumulate accumulate : {Accumulate::no, Accumulate::yes})
      for (const Index gap : {3, 8}) check_backward<Where>(e, 1, gap, accumulate);
  // With these gaps rows begin at multiples of 16 bytes, and end between two of them.
  check_backward<Where>({40, 517, 1029}, 1, 3, Accumulate::no);
  check_backward<Where>({40, 517, 1029}, 1, 3, Accumulate::yes);
}

TEST_CASE_TEMPLATE("linear_heads: gradients are those of every head", Where, ZAMBA_TEST_ON) {
  for (const Extents e : {Extents{0, 5, 6}, Extents{1, 33, 20}, Extents{64, 24, 40}, Extents{70, 19, 21}})
    for (const Accumulate accumulate : {Accumulate::no, Accumulate::yes}) check_backward<Where>(e, 3, 8, accumulate);
}

TEST_CASE_TEMPLATE("linear: gradients that are not wanted are left out", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  using F = compute_t<A>;
  auto ctx = new_context<Device>(2);
  const Index n = 20, in = 16, out = 24;
  const Array<Device, A> d_y(normal_values(n * out, 1)), x(normal_values(n * in, 2)),
      weight(normal_values(out * in, 3));
  const Array<Device, A> all_x(nans(static_cast<std::size_t>(n * in))), only_x(nans(static_cast<std::size_t>(n * in)));
  const Array<Device, F> all_w{Values(static_cast<std::size_t>(out * in))},
      only_w{Values(static_cast<std::size_t>(out * in))};
  const auto run = [&](Matrix<A> d_x, Matrix<F> d_weight) {
    linear_backward(ctx, d_y.view(n, out), d_weight ? x.view(n, in) : Matrix<A>{}, weight.view(out, in), d_x,
                    Accumulate::no, d_weight);
  };
  run(all_x.view(n, in), all_w.view(out, in));
  run(only_x.view(n, in), {});
  run({}, only_w.view(out, in));
  CHECK(only_x.values() == all_x.values());
  CHECK(only_w.values() == all_w.values());
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
