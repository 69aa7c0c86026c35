// SPDX-License-Identifier: MIT
#include <zamba/ops/rms_norm.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/random.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"
#include "../support/fixture.hpp"

namespace {

using namespace zamba;
using zamba::testing::finite_differences, zamba::testing::normal_values, zamba::testing::PaddedMatrix,
    zamba::testing::relative_error, zamba::testing::Values;

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
  /// Of one norm: the fixtures are rounded to float, and so is every sum in float.
  static constexpr double tolerance = sizeof(T) == 8 ? 2e-7 : 1e-6;
};

Values sum(Values a, const Values& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

struct Result {
  Values out, rstd, d_x, d_t, d_weight;
  bool operator==(const Result&) const = default;
};

/// Forward and backward over n positions; gradients begin at zero.
template <class Where>
Result run(const Values& x, const Values& t, const Values& weight, const Values& d_out, Index n, double eps,
           Index padding = 0, int threads = 1) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Values zeros(x.size()), unset(x.size(), std::nan(""));
  auto ctx = zamba::testing::new_context<Device>(threads);
  const PaddedMatrix<Device, T> x_(x, n, padding), dy(d_out, n, padding), out(unset, n, padding);
  const PaddedMatrix<Device, compute_t<T>> w(weight, 1), d_w(Values(weight.size()), 1),
      rstd(Values(static_cast<std::size_t>(n)), 1);
  const PaddedMatrix<Device, T> d_x(zeros, n, padding), d_t(unset, n, padding), t_(t.empty() ? zeros : t, n, padding);
  const Matrix<T> t_view = t.empty() ? Matrix<T>{} : t_.view(), d_t_view = t.empty() ? Matrix<T>{} : d_t.view();
  rms_norm(ctx, x_.view(), t_view, w.vector(), eps, out.view(), rstd.vector());
  rms_norm_backward(ctx, dy.view(), x_.view(), t_view, w.vector(), rstd.vector(), d_x.view(), d_t_view, d_w.vector());
  return {out.values(), rstd.values(), d_x.values(), t.empty() ? Values{} : d_t.values(), d_w.values()};
}

/// Left and right halves of rows of the given width.
std::pair<Values, Values> halves(const Values& values, Index width) {
  std::pair<Values, Values> parts;
  for (std::size_t i = 0; i < values.size(); ++i)
    (static_cast<Index>(i) % width < width / 2 ? parts.first : parts.second).push_back(values[i]);
  return parts;
}

TEST_CASE_TEMPLATE("rms_norm agrees with the reference", Where, ZAMBA_TEST_ON) {
  const auto& fixture = zamba::testing::Fixture::operators();
  const Values x = fixture.values("rms_norm.in.x"), weight = fixture.values("rms_norm.in.weight");
  const Result result = run<Where>(x, {}, weight, fixture.values("rms_norm.cotangent.y"), 21, 1e-5);
  CHECK(relative_error(result.out, fixture.values("rms_norm.out.y")) < Where::tolerance);
  CHECK(relative_error(result.d_x, fixture.values("rms_norm.grad.x")) < Where::tolerance);
  CHECK(relative_error(result.d_weight, fixture.values("rms_norm.grad.weight")) < Where::tolerance);
}

TEST_CASE_TEMPLATE("rms_norm of a sum is that of one input holding the sum", Where, ZAMBA_TEST_ON) {
  for (const Index d : {1, 10, 64, 131}) {
    const Index n = 37;
    const Values x = normal_values(n * d, 1), t = normal_values(n * d, 2), d_out = normal_values(n * d, 3);
    const Values weight = normal_values(d, 4);
    const Result two = run<Where>(x, t, weight, d_out, n, 1e-5);
    const Result one = run<Where>(sum(x, t), {}, weight, d_out, n, 1e-5);
    // The sum is rounded once more where it is an input, and one channel at d = 1 has only eps left of its gradient.
    CHECK(relative_error(two.out, one.out) < Where::tolerance);
    CHECK(two.d_t == two.d_x);
    if (d > 1) CHECK(relative_error(two.d_x, one.d_x) < 2 * Where::tolerance);
    CHECK(relative_error(two.d_weight, one.d_weight) < 2 * Where::tolerance);
  }
}

TEST_CASE("rms_norm: finite differences") {
  using Where = On<cpu, double>;
  const Index n = 3, d = 9;
  const double eps = 0.3;  // a large eps, so that a gradient without it would show
  const Values d_out = normal_values(n * d, 3);
  Values x = normal_values(n * d, 1), t = normal_values(n * d, 2), weight = normal_values(d, 4);
  const auto loss = [&] {
    const Values out = run<Where>(x, t, weight, d_out, n, eps).out;
    double total = 0;
    for (std::size_t i = 0; i < out.size(); ++i) total += out[i] * d_out[i];
    return total;
  };
  const auto numeric = [&](Values& values) { return finite_differences(values, 1e-5, loss); };
  const Result result = run<Where>(x, t, weight, d_out, n, eps);
  // Central differences: step^2 = 1e-10 of curvature, 1e-16 / step = 1e-11 of rounding.
  CHECK(relative_error(result.d_x, numeric(x)) < 1e-8);
  CHECK(relative_error(result.d_t, numeric(t)) < 1e-8);
  CHECK(relative_error(result.d_weight, numeric(weight)) < 1e-8);
}

TEST_CASE_TEMPLATE("rms_norm adds to d_x and d_weight and assigns d_t", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Index n = 2, d = 5;
  const Values x = normal_values(n * d, 1), weight = normal_values(d, 4), d_out = normal_values(n * d, 3);
  const Result fresh = run<Where>(x, x, weight, d_out, n, 1e-5);
  auto ctx = zamba::testing::new_context<Device>(1);
  const PaddedMatrix<Device, T> x_(x, n), w(weight, 1), dy(d_out, n), rstd(fresh.rstd, 1);
  const PaddedMatrix<Device, T> d_x(Values(n * d, 2.0), n), d_t(Values(n * d, 3.0), n), d_w(Values(d, 4.0), 1);
  rms_norm_backward(ctx, dy.view(), x_.view(), x_.view(), w.vector(), rstd.vector(), d_x.view(), d_t.view(),
                    d_w.vector());
  CHECK(relative_error(d_x.values(), sum(fresh.d_x, Values(n * d, 2.0))) < Where::tolerance);
  CHECK(d_t.values() == fresh.d_t);
  CHECK(relative_error(d_w.values(), sum(fresh.d_weight, Values(d, 4.0))) < Where::tolerance);
}

/// rms_norm_concat of the halves of c, forward and backward; d_x is that of both.
template <class Where>
Result run_concat(const Values& c, const Values& weight, const Values& d_out, Index n, Index padding) {
  using Device = typename Where::device;
  using T = typename Where::type;
  using F = compute_t<T>;
  const Index width = std::ssize(weight);
  const auto [a, b] = halves(c, width);
  auto ctx = zamba::testing::new_context<Device>(1);
  const PaddedMatrix<Device, T> a_(a, n, padding), b_(b, n), dy(d_out, n), out(Values(c.size()), n, padding);
  const PaddedMatrix<Device, T> d_a(Values(a.size()), n), d_b(Values(b.size()), n, padding);
  const PaddedMatrix<Device, F> w(weight, 1), d_w(Values(weight.size()), 1),
      rstd(Values(static_cast<std::size_t>(n)), 1);
  rms_norm_concat(ctx, a_.view(), b_.view(), w.vector(), 1e-5, out.view(), rstd.vector());
  rms_norm_concat_backward(ctx, dy.view(), a_.view(), b_.view(), w.vector(), rstd.vector(), d_a.view(), d_b.view(),
                           d_w.vector());
  Values d_x;
  const Values left = d_a.values(), right = d_b.values();
  for (Index i = 0; i < n; ++i)
    for (const Values* half : {&left, &right})
      d_x.insert(d_x.end(), half->begin() + i * width / 2, half->begin() + (i + 1) * width / 2);
  return {out.values(), rstd.values(), d_x, {}, d_w.values()};
}

TEST_CASE_TEMPLATE("rms_norm_concat is rms_norm of the concatenation", Where, ZAMBA_TEST_ON) {
  for (const Index d : {1, 12, 64, 100}) {
    const Index n = 33;
    const Values c = normal_values(n * 2 * d, 1), d_out = normal_values(n * 2 * d, 2), weight = normal_values(2 * d, 3);
    const Result whole = run<Where>(c, {}, weight, d_out, n, 1e-5), two = run_concat<Where>(c, weight, d_out, n, 3);
    CHECK(relative_error(two.out, whole.out) < Where::tolerance);
    CHECK(relative_error(two.d_x, whole.d_x) < 2 * Where::tolerance);
    CHECK(relative_error(two.d_weight, whole.d_weight) < Where::tolerance);
  }
}

TEST_CASE_TEMPLATE("rms_norm: strides, threads and reruns change no bit", Where, ZAMBA_TEST_ON) {
  const Index n = 301, d = 70;  // more positions than groups of the backward pass
  const Values x = normal_values(n * d, 1), t = normal_values(n * d, 2), d_out = normal_values(n * d, 3);
  const Values weight = normal_values(d, 4);
  const Result once = run<Where>(x, t, weight, d_out, n, 1e-5);
  CHECK(run<Where>(x, t, weight, d_out, n, 1e-5) == once);
  CHECK(run<Where>(x, t, weight, d_out, n, 1e-5, 7) == once);
  CHECK(run<Where>(x, t, weight, d_out, n, 1e-5, 0, 2) == once);
}

/// rms_norm of x + t, and rms_norm_concat of the halves of x, against plain sums in double.
template <class Where>
void check_forward(Index n, Index d, Index padding, double tolerance) {
  using Device = typename Where::device;
  using T = typename Where::type;
  using F = compute_t<T>;
  CAPTURE(n);
  CAPTURE(d);
  CAPTURE(padding);
  const double eps = 1e-5;
  auto ctx = zamba::testing::new_context<Device>(2);
  const PaddedMatrix<Device, T> x(normal_values(n * d, 1), n, padding), t(normal_values(n * d, 2), n, padding);
  const auto [left, right] = halves(x.values(), d);
  const PaddedMatrix<Device, T> a(left, n, padding), b(right, n, padding);
  const PaddedMatrix<Device, T> out(zamba::testing::nans(static_cast<std::size_t>(n * d)), n, padding);
  const PaddedMatrix<Device, F> weight(normal_values(d, 4), 1), rstd(Values(static_cast<std::size_t>(n)), 1);
  const auto check = [&](const Values& v) {
    Values wanted, wanted_rstd;
    const Values weights = weight.values();
    for (Index i = 0; i < n; ++i) {
      double squares = 0;
      for (Index c = 0; c < d; ++c) {
        const double value = v[static_cast<std::size_t>(i * d + c)];
        squares += value * value;
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(d) + eps);
      wanted_rstd.push_back(scale);
      for (Index c = 0; c < d; ++c)
        wanted.push_back(weights[static_cast<std::size_t>(c)] * v[static_cast<std::size_t>(i * d + c)] * scale);
    }
    CHECK(relative_error(out.values(), wanted) < tolerance);
    CHECK(relative_error(rstd.values(), wanted_rstd) < (sizeof(T) == 8 ? 1e-14 : 1e-6));
  };
  rms_norm(ctx, x.view(), t.view(), weight.vector(), eps, out.view(), rstd.vector());
  check(sum(x.values(), t.values()));
  if (d % 2) return;
  rms_norm_concat(ctx, a.view(), b.view(), weight.vector(), eps, out.view(), rstd.vector());
  check(x.values());
}

TEST_CASE_TEMPLATE("rms_norm: widths about what a block of threads holds, in pieces of 16 bytes or not", Where,
                   ZAMBA_TEST_ON) {
  const double tolerance = sizeof(typename Where::type) == 8 ? 1e-14 : 1e-6;
  for (const Index d : {8, 16, 1000, 4096, 4112, 8192, 8208, 8193}) check_forward<Where>(2, d, 8, tolerance);
  for (const Index d : {16, 4096, 4112}) check_forward<Where>(2, d, 3, tolerance);
  check_forward<Where>(1027, 16, 0, tolerance);  // several positions of a block on a GPU
}

/// values times 2^exponent, which is exact.
Values times_power_of_two(Values values, int exponent) {
  for (double& value : values) value = std::ldexp(value, exponent);
  return values;
}

TEST_CASE_TEMPLATE("rms_norm of every finite row: without eps the scale of a row changes neither output nor weights",
                   Where, ZAMBA_TEST_ON) {
  using F = typename Where::type;
  const int most = std::numeric_limits<F>::max_exponent;
  for (const Index d : {1, 24, 37, 9000}) {
    const Index n = 3;
    const Values x = normal_values(n * d, 1), t = normal_values(n * d, 2), d_out = normal_values(n * d, 3);
    const Values weight = normal_values(d, 4);
    const Result one = run<Where>(x, t, weight, d_out, n, 0);
    // Squares overflow from 2^(most / 2) on; from 2^(most - 2) on rstd is subnormal.
    for (const int exponent : {most / 2 - 8, most / 2 - 1, most / 2, most / 2 + 1, most * 3 / 4, most - 32, most - 8}) {
      CAPTURE(d);
      CAPTURE(exponent);
      const Result result =
          run<Where>(times_power_of_two(x, exponent), times_power_of_two(t, exponent), weight, d_out, n, 0);
      CHECK(relative_error(result.out, one.out) < Where::tolerance);
      CHECK(relative_error(times_power_of_two(result.rstd, exponent), one.rstd) < Where::tolerance);
      CHECK(relative_error(result.d_weight, one.d_weight) < Where::tolerance);
      // What is left of the gradient of one channel is rounding, and that of the greatest rows may be subnormal.
      if (d > 1 && exponent <= most - 32)
        CHECK(relative_error(times_power_of_two(result.d_x, exponent), one.d_x) < 4 * Where::tolerance);
    }
  }
}

TEST_CASE_TEMPLATE("rms_norm_concat where one half's squares overflow, or only their sum does", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const int most = std::numeric_limits<T>::max_exponent;
  auto ctx = zamba::testing::new_context<Device>(1);
  for (const double other : {1.0, std::ldexp(1.0, most / 2 - 1)}) {
    const double huge = other == 1 ? std::ldexp(1.0, most - 8) : other;  // 4 squares of 2^(most / 2 - 1) are 2^most
    const PaddedMatrix<Device, T> a({huge, huge}, 1), b({other, other}, 1), w({1, 2, 3, 4}, 1), out(Values(4), 1);
    const PaddedMatrix<Device, T> rstd(Values(1), 1);
    rms_norm_concat(ctx, a.view(), b.view(), w.vector(), 1e-5, out.view(), rstd.vector());
    const double root = std::sqrt((1 + other / huge * (other / huge)) / 2);
    const Values wanted{1 / root, 2 / root, 3 * (other / huge) / root, 4 * (other / huge) / root};
    CHECK(relative_error(out.values(), wanted) < Where::tolerance);
  }
}

TEST_CASE_TEMPLATE("rms_norm of a row with an infinity or a NaN is no number", Where, ZAMBA_TEST_ON) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {infinity, -infinity, std::nan("")}) {
    const Values out = run<Where>({1, bad, 2, 3}, {}, {1, 1}, {1, 1, 1, 1}, 2, 1e-5).out;
    CHECK(std::isnan(out[1]));
    CHECK(std::isfinite(out[3]));  // of another row
  }
}

TEST_CASE("rms_norm of no positions touches nothing") {
  Context<cpu> ctx(2);
  float weight[4] = {1, 1, 1, 1}, d_weight[4] = {1, 2, 3, 4}, unused[4] = {};
  const Matrix<float> none(unused, 0, 4);
  rms_norm(ctx, none, {}, Vector<float>(weight, 4), 1e-5, none, Vector<float>(unused, 0));
  rms_norm_backward(ctx, none, none, {}, Vector<float>(weight, 4), Vector<float>(unused, 0), none, {},
                    Vector<float>(d_weight, 4));
  CHECK(d_weight[0] == 1);
  CHECK(d_weight[3] == 4);
  CHECK(unused[0] == 0);
}

}  // namespace
