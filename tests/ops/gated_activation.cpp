// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/gated_activation.hpp>
#include <zamba/ops/linear.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"
#include "../support/fixture.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
};

double activate(Activation activation, double x) {
  return activation == Activation::gelu ? x * 0.5 * std::erfc(-x / std::sqrt(2.0)) : x / (1 + std::exp(-x));
}

/// A fixture's tensor as a matrix of A with the last extent as columns.
template <class A>
struct Stored {
  explicit Stored(const std::string& name) {
    const auto raw = Fixture::operators().values("gelu_gated_mlp." + name);
    const Index cols = Fixture::operators().shape("gelu_gated_mlp." + name).back();
    values.assign(raw.begin(), raw.end());
    view = Matrix<A>(values.data(), static_cast<Index>(values.size()) / cols, cols);
  }
  Stored(const Stored&) = delete;
  std::vector<A> values;
  Matrix<A> view;
};

/// Of an element, beside a few roundings of values up to about 10: outputs in bf16 are rounded to 8 bits.
template <class A>
double bound(double exact) {
  if constexpr (std::is_same_v<A, double>) return 1e-14;
  return 2e-6 + (std::is_same_v<A, bf16> ? std::abs(exact) * 0x1p-8 : 0);
}

double slope(Activation activation, double x) {
  const double gate = 1 / (1 + std::exp(-x));
  return activation == Activation::gelu
             ? 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0))
             : gate * (1 + x / (1 + std::exp(x)));
}

constexpr Activation both[] = {Activation::gelu, Activation::silu};

}  // namespace

TEST_CASE_TEMPLATE("gated_activation: the gated MLP of the reference, through linear", A, float, double) {
  // The fixtures are float32: 1e-6 is their own rounding after three products.
  Context<cpu> ctx(2);
  Stored<A> x("in.x"), gate_proj("in.gate_proj"), up_proj("in.up_proj"), down_proj("in.down_proj");
  Stored<A> y("out.y"), d_y("cotangent.y");
  Stored<A> wanted_x("grad.x"), wanted_gate("grad.gate_proj"), wanted_up("grad.up_proj"), wanted_down("grad.down_proj");
  Strided<A> gate(10, 20, 0, 1), up(10, 20, 0, 2), hidden(10, 20, 0, 3), out(10, 12, 0, 4);
  linear(ctx, x.view, gate_proj.view, gate.view);
  linear(ctx, x.view, up_proj.view, up.view);
  gated_activation(ctx, Activation::gelu, gate.view, up.view, hidden.view);
  linear(ctx, hidden.view, down_proj.view, out.view);
  CHECK(relative_error(out.values, y.values) <= 1e-6);

  Strided<A> d_hidden(10, 20, 0, 5), d_gate(10, 20, 0, 6), d_up(10, 20, 0, 7), d_x(10, 12, 0, 8);
  std::vector<A> d_gate_proj(240), d_up_proj(240), d_down_proj(240);
  linear_backward(ctx, d_y.view, hidden.view, down_proj.view, d_hidden.view, Accumulate::no,
                  Matrix<A>(d_down_proj.data(), 12, 20));
  gated_activation_backward(ctx, Activation::gelu, d_hidden.view, gate.view, up.view, d_gate.view, d_up.view);
  linear_backward(ctx, d_gate.view, x.view, gate_proj.view, d_x.view, Accumulate::no,
                  Matrix<A>(d_gate_proj.data(), 20, 12));
  linear_backward(ctx, d_up.view, x.view, up_proj.view, d_x.view, Accumulate::yes, Matrix<A>(d_up_proj.data(), 20, 12));
  CHECK(relative_error(d_x.values, wanted_x.values) <= 1e-6);
  CHECK(relative_error(d_gate_proj, wanted_gate.values) <= 1e-6);
  CHECK(relative_error(d_up_proj, wanted_up.values) <= 1e-6);
  CHECK(relative_error(d_down_proj, wanted_down.values) <= 1e-6);
}

TEST_CASE_TEMPLATE("gated_activation: errors over the line stay within the contract", A, float, double) {
  constexpr Index count = 40001;  // [-20, 20]
  Context<cpu> ctx(2);
  std::vector<A> gate(count), up(count, A(1)), out(count), d_gate(count), d_up(count);
  for (Index i = 0; i < count; ++i) gate[static_cast<std::size_t>(i)] = A(0.001) * static_cast<A>(i - 20000);
  const Matrix<A> g(gate.data(), 1, count), u(up.data(), 1, count), o(out.data(), 1, count);
  for (Activation activation : both) {
    CAPTURE(static_cast<int>(activation));
    gated_activation(ctx, activation, g, u, o);
    gated_activation_backward(ctx, activation, u, g, u, Matrix<A>(d_gate.data(), 1, count),
                              Matrix<A>(d_up.data(), 1, count));
    CHECK(d_up == out);
    double distribution = 0, relative = 0, error = 0;
    for (Index i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double x = static_cast<double>(gate[at]), exact = activate(activation, x);
      if (x == 0) {
        CHECK(out[at] == 0);
        continue;
      }
      const double product = std::numeric_limits<A>::epsilon() / 2 * std::abs(exact);  // the rounding of x P(x) itself
      distribution = std::max(distribution, (std::abs(static_cast<double>(out[at]) - exact) - product) / std::abs(x));
      if (x > -9) relative = std::max(relative, std::abs(static_cast<double>(out[at]) / exact - 1));
      error = std::max(error, std::abs(static_cast<double>(d_gate[at]) - slope(activation, x)));
    }
    CHECK(distribution <= (std::is_same_v<A, double> ? 1e-15 : 0x1p-23));
    CHECK(relative <= (std::is_same_v<A, double> ? 1e-13 : 3e-6));
    CHECK(error <= (std::is_same_v<A, double> ? 2e-15 : 4e-7));  // a few roundings of values up to 1.13
  }
}

TEST_CASE_TEMPLATE("gated_activation: strided views of every width, on any number of threads", A, float, double) {
  for (Activation activation : both)
    for (Index width : {1, 7, 16, 33, 100, 9001})
      for (Index rows : {0, 1, 5}) {
        CAPTURE(width);
        Strided<A> gate(rows, width, 3, 1), up(rows, width, 1, 2), out(rows, width, 2, 3), single(rows, width, 2, 3);
        const auto before = out.values;
        Context<cpu> two(2), one(1);
        gated_activation(two, activation, gate.view, up.view, out.view);
        gated_activation(one, activation, gate.view, up.view, single.view);
        CHECK(out.values == single.values);
        bool close = true;
        for (Index t = 0; t < rows; ++t) {
          for (Index j = 0; j < width; ++j) {
            const double exact = activate(activation, gate.view(t, j)) * static_cast<double>(up.view(t, j));
            const double bound = std::is_same_v<A, double> ? 1e-14 : 2e-6;  // a few roundings of values up to about 10
            close = close && std::abs(static_cast<double>(out.view(t, j)) - exact) <= bound;
          }
          close = close && out.view.data[t * (width + 2) - 1] == before[static_cast<std::size_t>(t * (width + 2))];
          close = close &&
                  out.view.data[t * (width + 2) + width] == before[static_cast<std::size_t>((t + 1) * (width + 2) - 1)];
        }
        CHECK(close);
      }
}

TEST_CASE_TEMPLATE("gated_activation: rows with gaps, and rows in whole pieces of 16 bytes", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  struct Layout {
    Index width, gate_gap, up_gap, out_gap;
  };
  for (Activation activation : both)
    for (const Layout layout : {Layout{1, 3, 1, 2}, Layout{100, 3, 1, 2}, Layout{104, 8, 16, 8}, Layout{104, 8, 1, 8},
                                Layout{104, 8, 8, 3}, Layout{2056, 8, 0, 16}})
      for (Index rows : {1, 5}) {
        CAPTURE(layout.width);
        CAPTURE(layout.up_gap);
        CAPTURE(layout.out_gap);
        auto ctx = new_context<Device>(2);
        const PaddedMatrix<Device, A> gate(normal_values(rows * layout.width, 1), rows, layout.gate_gap);
        const PaddedMatrix<Device, A> up(normal_values(rows * layout.width, 2), rows, layout.up_gap);
        const Index all = layout.width + layout.out_gap, first = layout.out_gap / 8 * 8;  // out is a slice of columns
        const Array<Device, A> out(normal_values(rows * all, 3));
        const Values before = out.values();
        gated_activation(ctx, activation, gate.view(), up.view(), out.view(rows, all).columns(first, layout.width));
        const Values after = out.values(), gates = gate.values(), ups = up.values();
        bool close = true, untouched = true;
        for (Index t = 0; t < rows; ++t)
          for (Index j = 0; j < all; ++j) {
            const auto at = static_cast<std::size_t>(t * all + j);
            if (j < first || j - first >= layout.width) {
              untouched = untouched && after[at] == before[at];
              continue;
            }
            const auto from = static_cast<std::size_t>(t * layout.width + j - first);
            const double exact = activate(activation, gates[from]) * ups[from];
            close = close && std::abs(after[at] - exact) <= bound<A>(exact);
          }
        CHECK(close);
        CHECK(untouched);
        if constexpr (defines_backward<GatedActivation<Device>>) {
          const PaddedMatrix<Device, A> d_out(normal_values(rows * layout.width, 4), rows, layout.up_gap);
          const PaddedMatrix<Device, A> d_gate(nans(gates.size()), rows, layout.gate_gap);
          const PaddedMatrix<Device, A> d_up(nans(gates.size()), rows, layout.up_gap);
          gated_activation_backward(ctx, activation, d_out.view(), gate.view(), up.view(), d_gate.view(), d_up.view());
          const Values d = d_out.values(), to_gate = d_gate.values(), to_up = d_up.values();
          for (std::size_t i = 0; i < gates.size(); ++i) {
            const double exact_gate = d[i] * ups[i] * slope(activation, gates[i]);
            const double exact_up = d[i] * activate(activation, gates[i]);
            close = close && std::abs(to_gate[i] - exact_gate) <= bound<A>(exact_gate) &&
                    std::abs(to_up[i] - exact_up) <= bound<A>(exact_up);
          }
          CHECK(close);
        }
      }
}

TEST_CASE("gated_activation: gradients agree with finite differences") {
  Context<cpu> ctx(1);
  for (Activation activation : both) {
    Strided<double> gate(3, 11, 0, 1), up(3, 11, 0, 2), d_out(3, 11, 0, 3), out(3, 11, 0, 4);
    Strided<double> d_gate(3, 11, 0, 5), d_up(3, 11, 0, 6);
    gated_activation_backward(ctx, activation, d_out.view, gate.view, up.view, d_gate.view, d_up.view);
    const auto loss = [&] {
      gated_activation(ctx, activation, gate.view, up.view, out.view);
      double sum = 0;
      for (std::size_t i = 0; i < out.values.size(); ++i) sum += d_out.values[i] * out.values[i];
      return sum;
    };
    // Central differences of step h are exact to h^2 / 6 of the third derivative, which is of order 1 here.
    CHECK(relative_error(d_gate.values, finite_differences(gate.values, 1e-4, loss)) <= 1e-8);
    CHECK(relative_error(d_up.values, finite_differences(up.values, 1e-4, loss)) <= 1e-8);
  }
}

TEST_CASE_TEMPLATE("gated_activation: a NaN stays a NaN", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  auto ctx = new_context<Device>(1);
  for (const Index count : {20, 24}) {
    Values ones(static_cast<std::size_t>(count), 1.0), gates = ones;
    gates[3] = std::nan("");
    const Array<Device, A> gate(gates), up(ones), out(ones), d_gate(ones), d_up(ones);
    for (Activation activation : both) {
      gated_activation(ctx, activation, gate.view(1, count), up.view(1, count), out.view(1, count));
      if constexpr (defines_backward<GatedActivation<Device>>)
        gated_activation_backward(ctx, activation, up.view(1, count), gate.view(1, count), up.view(1, count),
                                  d_gate.view(1, count), d_up.view(1, count));
      for (std::size_t i = 0; i < ones.size(); ++i) {
        CHECK(std::isnan(out.values()[i]) == (i == 3));
        if constexpr (defines_backward<GatedActivation<Device>>) CHECK(std::isnan(d_gate.values()[i]) == (i == 3));
      }
    }
  }
}
