// SPDX-License-Identifier: MIT
// gated_activation on CUDA, forward; equations and shapes in gated_activation.hpp. A thread takes 16 bytes of a row, or
// one element where rows are not in such pieces. Bound by memory bandwidth.
//
// Numeric contract: computed in compute_t, rounded once when written. In float and double erf is CUDA's own, within 2
// units in the last place. For bf16, which keeps 8 bits, the normal distribution function is within 2^-22 of its value,
// and gelu before its rounding within 4e-6 of itself down to x = -9. silu in float is within (3 + |x|) 1e-7 of itself.
#pragma once

#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/gated_activation.hpp>

namespace zamba {

namespace kernel {

template <class A>
struct GatedActivationElements {
  using F = compute_t<A>;
  Activation activation;
  Matrix<const A> gate, up;
  Matrix<A> out;

  /// The normal distribution function. For bf16 by its fitted tail: half of erfc's instructions, which would take
  /// longer than memory.
  static __device__ F gelu_share(F x) {
    if constexpr (std::is_same_v<A, bf16>) {
      constexpr NormalTail fitted;
      const float a = ::fabsf(x), t = reciprocal_approximate(::fmaf(NormalTail::slope, a, 1.0f));
      float sum = fitted(NormalTail::degree);
#pragma unroll
      for (int k = NormalTail::degree - 1; k >= 0; --k) sum = ::fmaf(sum, t, fitted(k));
      const float tail = exp2_approximate(-0.5f * log2_e * (a * a)) * t * sum;
      return x < 0 ? tail : 1.0f - tail;
    } else {
      return F(0.5) * ::erfc(x * F(-0.70710678118654752440));
    }
  }

  template <int Width>
  __device__ void vector(Index t, Index j) const {
    const auto gates = load_vector_streaming<Width>(&gate(t, j)), ups = load_vector_streaming<Width>(&up(t, j));
    F x[Width], by[Width];
    gates.unpack(x);
    ups.unpack(by);
    if (activation == Activation::gelu) {
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = x[i] * gelu_share(x[i]) * by[i];
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = silu(x[i]) * by[i];
    }
    store_vector(&out(t, j), x);
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
};

}  // namespace zamba
