// SPDX-License-Identifier: MIT
// gated_activation on CUDA; equations and shapes in gated_activation.hpp. A thread takes 16 bytes of a row, or one
// element where rows are not in such vectors. Bound by memory bandwidth.
//
// Numeric contract: computed in compute_t, rounded once when written. In float and double erf is CUDA's own, within 2
// units in the last place. For bf16, which keeps 8 bits, the normal distribution function is within 2^-22 of its value,
// and gelu before its rounding within 4e-6 of itself down to x = -9. silu in float is within (3 + |x|) 1e-7 of itself.
// Gradients may be the memory of inputs.
#pragma once

#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/math.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/gated_activation.hpp>

namespace zamba {

namespace kernel {

/// gelu of elements stored as A, and its derivative.
template <class A>
struct Gelu {
  using F = compute_t<A>;

  /// The normal distribution function of x and its density times sqrt(2 pi). For bf16 by its fitted tail: half of
  /// erfc's instructions, which would take longer than memory.
  struct Distribution {
    F below, bell;

    __device__ explicit Distribution(F x) {
      if constexpr (std::is_same_v<A, bf16>) {
        constexpr NormalTail fitted;
        const float a = ::fabsf(x), t = reciprocal_approximate(::fmaf(NormalTail::slope, a, 1.0f));
        float sum = fitted(NormalTail::degree);
#pragma unroll
        for (int k = NormalTail::degree - 1; k >= 0; --k) sum = ::fmaf(sum, t, fitted(k));
        bell = exp2_approximate(-0.5f * log2_e * (a * a));
        const float tail = bell * t * sum;
        below = x < 0 ? tail : 1.0f - tail;
      } else {
        bell = ::exp(F(-0.5) * x * x);
        below = F(0.5) * ::erfc(x * F(-0.70710678118654752440));
      }
    }
  };
  static __device__ F value(F x) { return x * Distribution(x).below; }
  static __device__ void differentiate(F x, F& value, F& slope) {
    const Distribution at(x);
    value = x * at.below;
    slope = ::fma(x * F(0.39894228040143267794), at.bell, at.below);
  }
};

template <class A>
struct Silu {
  using F = compute_t<A>;
  static __device__ F value(F x) { return silu(x); }
  static __device__ void differentiate(F x, F& value, F& slope) {
    const F gate = sigmoid(x);
    value = x * gate;
    slope = silu_slope(x, gate);
  }
};

/// f(Gelu or Silu).
template <class A, class F>
__device__ void with_activation(Activation activation, F&& f) {
  activation == Activation::gelu ? f(Gelu<A>{}) : f(Silu<A>{});
}

template <class A>
struct GatedActivationElements {
  using F = compute_t<A>;
  Activation activation;
  Matrix<const A> gate, up;
  Matrix<A> out;

  template <int Width>
  __device__ void vector(Index t, Index j) const {
    const auto gates = load_vector_streaming<Width>(&gate(t, j)), ups = load_vector_streaming<Width>(&up(t, j));
    F x[Width], by[Width];
    gates.unpack(x);
    ups.unpack(by);
    with_activation<A>(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = act.value(x[i]) * by[i];
    });
    store_vector(&out(t, j), x);
  }
};

template <class A>
struct GatedActivationGradient {
  using F = compute_t<A>;
  Activation activation;
  Matrix<const A> d_out, gate, up;
  Matrix<A> d_gate, d_up;

  template <int Width>
  __device__ void vector(Index t, Index j) const {
    const auto gates = load_vector_streaming<Width>(&gate(t, j)), ups = load_vector_streaming<Width>(&up(t, j));
    F x[Width], by[Width], d[Width];
    load_vector_streaming<Width>(&d_out(t, j)).unpack(d);
    gates.unpack(x);
    ups.unpack(by);
    with_activation<A>(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        F value, slope;
        act.differentiate(x[i], value, slope);
        by[i] *= d[i] * slope;
        d[i] *= value;
      }
    });
    store_vector(&d_gate(t, j), by);
    store_vector(&d_up(t, j), d);
  }
};

}  // namespace kernel

template <>
struct GatedActivation<cuda> {
  template <class A>
  static void forward(Context<cuda>& ctx, Activation activation, Matrix<const A> gate, Matrix<const A> up,
                      Matrix<A> out) {
    const bool whole = kernel::in_vectors(gate) && kernel::in_vectors(up) && kernel::in_vectors(out);
    kernel::for_vectors<A>(ctx, whole, out.rows(), out.cols(),
                           kernel::GatedActivationElements<A>{activation, gate, up, out}, "gated_activation");
  }

  template <class A>
  static void backward(Context<cuda>& ctx, Activation activation, Matrix<const A> d_out, Matrix<const A> gate,
                       Matrix<const A> up, Matrix<A> d_gate, Matrix<A> d_up) {
    const bool whole = kernel::in_vectors(d_out) && kernel::in_vectors(gate) && kernel::in_vectors(up) &&
                       kernel::in_vectors(d_gate) && kernel::in_vectors(d_up);
    kernel::for_vectors<A>(ctx, whole, d_out.rows(), d_out.cols(),
                           kernel::GatedActivationGradient<A>{activation, d_out, gate, up, d_gate, d_up},
                           "gated_activation_backward");
  }
};

}  // namespace zamba
