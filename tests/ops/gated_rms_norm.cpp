// SPDX-License-Identifier: MIT
#include <zamba/ops/gated_rms_norm.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/rms_norm.hpp>
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

struct Result {
  Values out, rstd, d_x, d_z, d_weight;
  bool operator==(const Result&) const = default;
};

/// Forward and, where the device has it, backward over n positions in so many groups; what is assigned is poisoned
/// before.
template <class Where>
Result run(const Values& x, const Values& z, const Values& weight, const Values& d_out, Index n, Index groups,
           double eps = 1e-5, Index padding = 0, int threads = 1) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Values unset(x.size(), std::nan(""));
  auto ctx = zamba::testing::new_context<Device>(threads);
  const PaddedMatrix<Device, T> x_(x, n, padding), z_(z, n, padding), dy(d_out, n, padding);
  const PaddedMatrix<Device, T> out(unset, n, padding), d_x(unset, n, padding), d_z(unset, n, padding);
  const PaddedMatrix<Device, compute_t<T>> w(weight, 1), d_w(Values(weight.size()), 1),
      rstd(Values(static_cast<std::size_t>(n * groups)), n);
  gated_rms_norm(ctx, x_.view(), z_.view(), w.vector(), eps, out.view(), rstd.view());
  if constexpr (defines_backward<GatedRmsNorm<Device>>) {
    gated_rms_norm_backward(ctx, dy.view(), x_.view(), z_.view(), w.vector(), rstd.view(), d_x.view(), d_z.view(),
                            d_w.vector());
    return {out.values(), rstd.values(), d_x.values(), d_z.values(), d_w.values()};
  } else {
    return {out.values(), rstd.values(), {}, {}, {}};
  }
}

TEST_CASE_TEMPLATE("gated_rms_norm agrees with the reference", Where, ZAMBA_TEST_ON) {
  const auto& fixture = zamba::testing::Fixture::operators();
  const auto value = [&](const char* name) { return fixture.values(std::string("gated_rms_norm_2_groups.") + name); };
  const Result result = run<Where>(value("in.x"), value("in.gate"), value("in.weight"), value("cotangent.y"), 21, 2);
  CHECK(relative_error(result.out, value("out.y")) < Where::tolerance);
  if (!defines_backward<GatedRmsNorm<typename Where::device>>) return;
  CHECK(relative_error(result.d_x, value("grad.x")) < Where::tolerance);
  CHECK(relative_error(result.d_z, value("grad.gate")) < Where::tolerance);
  CHECK(relative_error(result.d_weight, value("grad.weight")) < Where::tolerance);
}

TEST_CASE_TEMPLATE("gated_rms_norm is rms_norm of each group of the gated input", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  for (const Index width : {1, 5, 64, 131})
    for (const Index groups : {1, 3}) {
      const Index n = 19, D = width * groups;
      const Values x = normal_values(n * D, 1), z = normal_values(n * D, 2), weight = normal_values(D, 3);
      const Values out = run<Where>(x, z, weight, normal_values(n * D, 4), n, groups).out;
      auto ctx = zamba::testing::new_context<Device>(1);
      Values expected(out.size());
      for (Index g = 0; g < groups; ++g) {
        Values v, w;
        for (Index i = 0; i < n; ++i)
          for (Index c = g * width; c < (g + 1) * width; ++c)
            v.push_back(x[i * D + c] * z[i * D + c] / (1 + std::exp(-z[i * D + c])));
        for (Index c = g * width; c < (g + 1) * width; ++c) w.push_back(weight[c]);
        const PaddedMatrix<Device, T> v_(v, n), w_(w, 1), normed(v, n), rstd(Values(static_cast<std::size_t>(n)), 1);
        rms_norm(ctx, v_.view(), {}, w_.vector(), 1e-5, normed.view(), rstd.vector());
        const Values values = normed.values();
        for (Index i = 0; i < n; ++i)
          for (Index c = 0; c < width; ++c) expected[i * D + g * width + c] = values[i * width + c];
      }
      CHECK(relative_error(out, expected) < Where::tolerance);
    }
}

TEST_CASE("gated_rms_norm: finite differences") {
  using Where = On<cpu, double>;
  const Index n = 3, groups = 2, D = 10;
  const double eps = 0.3;  // a large eps, so that a gradient without it would show
  const Values d_out = normal_values(n * D, 3);
  Values x = normal_values(n * D, 1), z = normal_values(n * D, 2), weight = normal_values(D, 4);
  const auto loss = [&] {
    const Values out = run<Where>(x, z, weight, d_out, n, groups, eps).out;
    double total = 0;
    for (std::size_t i = 0; i < out.size(); ++i) total += out[i] * d_out[i];
    return total;
  };
  const auto numeric = [&](Values& values) { return finite_differences(values, 1e-5, loss); };
  const Result result = run<Where>(x, z, weight, d_out, n, groups, eps);
  // Central differences: step^2 = 1e-10 of curvature, 1e-16 / step = 1e-11 of rounding.
  CHECK(relative_error(result.d_x, numeric(x)) < 1e-8);
  CHECK(relative_error(result.d_z, numeric(z)) < 1e-8);
  CHECK(relative_error(result.d_weight, numeric(weight)) < 1e-8);
}

TEST_CASE_TEMPLATE("gated_rms_norm: strides, threads and reruns change no bit", Where, ZAMBA_TEST_ON) {
  const Index n = 301, D = 70;
  const Values x = normal_values(n * D, 1), z = normal_values(n * D, 2), d_out = normal_values(n * D, 3);
  const Values weight = normal_values(D, 4);
  const Result once = run<Where>(x, z, weight, d_out, n, 2);
  CHECK(run<Where>(x, z, weight, d_out, n, 2) == once);
  CHECK(run<Where>(x, z, weight, d_out, n, 2, 1e-5, 7) == once);
  CHECK(run<Where>(x, z, weight, d_out, n, 2, 1e-5, 0, 2) == once);
}

TEST_CASE_TEMPLATE("gated_rms_norm of every finite row: without eps the scale of x changes neither output nor weights",
                   Where, ZAMBA_TEST_ON) {
  using F = typename Where::type;
  const int most = std::numeric_limits<F>::max_exponent;
  const Index n = 3, groups = 2;
  for (const Index D : {16, 26, 18000}) {
    const Values x = normal_values(n * D, 1), weight = normal_values(D, 3), d_out = normal_values(n * D, 4);
    Values z = normal_values(n * D, 2);
    for (double& value : z) value *= 5;  // x z may overflow where x silu(z) does not
    const Result one = run<Where>(x, z, weight, d_out, n, groups, 0);
    for (const int exponent : {most / 2 - 1, most / 2, most * 3 / 4, most - 32, most - 8}) {
      CAPTURE(D);
      CAPTURE(exponent);
      const auto times = [&](Values values) {
        for (double& value : values) value = std::ldexp(value, exponent);
        return values;
      };
      const Result result = run<Where>(times(x), z, weight, d_out, n, groups, 0);
      CHECK(relative_error(result.out, one.out) < Where::tolerance);
      CHECK(relative_error(times(result.rstd), one.rstd) < Where::tolerance);
      if (!defines_backward<GatedRmsNorm<typename Where::device>>) continue;
      CHECK(relative_error(result.d_weight, one.d_weight) < Where::tolerance);
      if (exponent > most - 32) continue;  // d_v may be subnormal
      CHECK(relative_error(times(result.d_x), one.d_x) < Where::tolerance);
      CHECK(relative_error(result.d_z, one.d_z) < Where::tolerance);
    }
  }
}

}  // namespace
