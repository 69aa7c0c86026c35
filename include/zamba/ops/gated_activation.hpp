// SPDX-License-Identifier: MIT
// gated_activation: the middle of a gated MLP (Shazeer 2020), elementwise.
//
//   forward    out = act(gate) * up                              gate, up, out (n, f)
//   backward   d_gate = d_out * up * act'(gate),  d_up = d_out * act(gate)
//
//   gelu(x) = x P(x), P the normal distribution function (1 + erf(x / sqrt 2)) / 2: the exact form, not that with tanh
//   silu(x) = x / (1 + e^-x)
//
// Kept for the backward pass: gate and up.
//
// Numeric contract: computed in the activation type. In float, P and the logistic function are within 2^-23 (1.2e-7) of
// their exact values, and gelu within 3e-6 of itself down to x = -9 (the rounding of the exponent x^2 / 2); in double P
// comes from std::erfc. Elementwise, so the number of threads does not matter; outputs may be the memory of inputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/device.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/op.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// What the gate of an MLP goes through.
enum class Activation { gelu, silu };

ZAMBA_DECLARE_OPERATOR(GatedActivation, "gated_activation.cuh");

namespace kernel {

/// The upper tail of the normal distribution is e^(-a^2 / 2) m(a) for a >= 0, where m falls smoothly from 1/2 like
/// 1 / (a sqrt(2 pi)): here t = 1 / (1 + slope a) times a polynomial in t of these coefficients, fitted to 3e-8 of m
/// for a <= 14.
struct NormalTail {
  static constexpr int degree = 8;
  static constexpr float slope = 0.34f;
  ZAMBA_HOST_DEVICE constexpr float operator()(int k) const {
    constexpr float fitted[] = {0.1356205034f, 0.1361121989f,  0.1151976344f, 0.1153592940f,  -0.04471884949f,
                                0.2021833839f, -0.2731334886f, 0.1394999127f, -0.02612057418f};
    return fitted[k];
  }
};

}  // namespace kernel

template <>
struct GatedActivation<cpu> {
  template <class A>
  static void forward(Context<cpu>& ctx, Activation activation, Matrix<const A> gate, Matrix<const A> up,
                      Matrix<A> out) {
    with_activation<A>(activation, [&](auto act) {
      for_all<A>(
          ctx, out.rows(), out.cols(), [&](Index t, Index j, Index count) __attribute__((always_inline)) {
            const auto a = act(load(gate, t, j, count));
            store(out, t, j, count, a.value * load(up, t, j, count));
          });
    });
  }

  template <class A>
  static void backward(Context<cpu>& ctx, Activation activation, Matrix<const A> d_out, Matrix<const A> gate,
                       Matrix<const A> up, Matrix<A> d_gate, Matrix<A> d_up) {
    with_activation<A>(activation, [&](auto act) {
      for_all<A>(
          ctx, d_out.rows(), d_out.cols(), [&](Index t, Index j, Index count) __attribute__((always_inline)) {
            const auto a = act(load(gate, t, j, count));
            const auto u = load(up, t, j, count), d = load(d_out, t, j, count);
            store(d_gate, t, j, count, d * u * a.slope);
            store(d_up, t, j, count, d * a.value);
          });
    });
  }

 private:
  template <class A>
  struct ValueAndSlope {
    kernel::Pack<A> value, slope;
  };

  template <class A>
  __attribute__((always_inline)) static ValueAndSlope<A> gelu(const kernel::Pack<A>& x) {
    const kernel::Pack<A> a = x < A(0) ? -x : x;
    const kernel::Pack<A> bell = kernel::exp<A>(A(-0.5) * a * a);
    kernel::Pack<A> tail;
    if constexpr (std::is_same_v<A, float>) {
      using Tail = kernel::NormalTail;
      const kernel::Pack<A> t = 1.0f / (1.0f + Tail::slope * a);
      tail = bell * t * kernel::horner<0, Tail::degree, float>(t, Tail{});
    } else {
      for (Index i = 0; i < kernel::lanes<A>; ++i) tail[i] = A(0.5) * std::erfc(a[i] * A(0.70710678118654752440));
    }
    const kernel::Pack<A> below = x < A(0) ? tail : A(1) - tail;
    return {x * below, below + x * bell * A(0.39894228040143267794)};
  }

  template <class A>
  __attribute__((always_inline)) static ValueAndSlope<A> silu(const kernel::Pack<A>& x) {
    const kernel::Pack<A> e = kernel::exp<A>(x < A(0) ? x : -x), above = A(1) / (A(1) + e), below = e * above;
    return {x * (x < A(0) ? below : above), (x < A(0) ? below : above) + x * below * above};
  }

  template <class A, class F>
  static void with_activation(Activation activation, F&& f) {
    if (activation == Activation::gelu)
      f([](const kernel::Pack<A>& x) __attribute__((always_inline)) { return gelu<A>(x); });
    else
      f([](const kernel::Pack<A>& x) __attribute__((always_inline)) { return silu<A>(x); });
  }

  /// f(row, column, count) for every register's worth of a (rows, cols) matrix.
  template <class A, class F>
  static void for_all(Context<cpu>& ctx, Index rows, Index cols, F&& f) {
    constexpr Index width = 4096;  // of a task: some 10 us of work
    const Index across = ceil_div(cols, width);
    const Index height = std::clamp<Index>(4 * width / std::max<Index>(cols, 1), 1, 256);
    ctx.parallel_for(ceil_div(rows, height) * across, [&](Index i, int) {
      const Index row = i / across * height, col = i % across * width, end = std::min(cols, col + width);
      for (Index t = row; t < std::min(rows, row + height); ++t)
        kernel::for_packs<A>(
            end - col, [&](Index j, auto count) __attribute__((always_inline)) { f(t, col + j, count); });
    });
  }

  template <class A>
  __attribute__((always_inline)) static kernel::Pack<std::remove_const_t<A>> load(const Matrix<A>& from, Index t,
                                                                                  Index j, Index count) {
    using Value = std::remove_const_t<A>;
    const A* at = from.data + t * from.stride[0] + j;
    return count == kernel::lanes<Value> ? kernel::load<Value>(at) : kernel::load<Value>(at, count);
  }

  template <class A>
  __attribute__((always_inline)) static void store(const Matrix<A>& to, Index t, Index j, Index count,
                                                   const kernel::Pack<A>& pack) {
    A* at = to.data + t * to.stride[0] + j;
    count == kernel::lanes<A> ? kernel::store<A>(at, pack) : kernel::store<A>(at, pack, count);
  }
};

/// out = act(gate) * up.
template <class D, class A>
void gated_activation(Context<D>& ctx, Activation activation, std::type_identity_t<Matrix<const A>> gate,
                      std::type_identity_t<Matrix<const A>> up, Matrix<A> out) {
  if constexpr (checked) {
    const kernel::Door door{"gated_activation"};
    door.shape("gate", gate, out.rows(), out.cols());
    door.shape("up", up, out.rows(), out.cols());
  }
  GatedActivation<D>::forward(ctx, activation, gate, up, out);
}

/// d_gate = d_out * up * act'(gate), d_up = d_out * act(gate).
template <class D, class A>
void gated_activation_backward(Context<D>& ctx, Activation activation, std::type_identity_t<Matrix<const A>> d_out,
                               std::type_identity_t<Matrix<const A>> gate, std::type_identity_t<Matrix<const A>> up,
                               Matrix<A> d_gate, Matrix<A> d_up) {
  if constexpr (checked) {
    const kernel::Door door{"gated_activation_backward"};
    const Index n = d_out.rows(), f = d_out.cols();
    door.shape("gate", gate, n, f);
    door.shape("up", up, n, f);
    door.shape("d_gate", d_gate, n, f);
    door.shape("d_up", d_up, n, f);
  }
  GatedActivation<D>::backward(ctx, activation, d_out, gate, up, d_gate, d_up);
}

}  // namespace zamba
