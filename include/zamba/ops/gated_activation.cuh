// SPDX-License-Identifier: MIT
// gated_activation on CUDA, forward; equations and shapes in gated_activation.hpp. A thread takes 16 bytes of a row, or
// one element where rows are not in such pieces. Bound by memory bandwidth.
//
// Numeric contract: computed in compute_t, rounded once when written; erf and exp are CUDA's own, within 2 units in the
// last place.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/gated_activation.hpp>

namespace zamba {

namespace detail {

template <class A>
struct GatePiece {
  using F = compute_t<A>;
  Activation activation;
  Matrix<const A> gate, up;
  Matrix<A> out;

  static __device__ F gelu_share(F x) { return F(0.5) * ::erfc(x * F(-0.70710678118654752440)); }
  static __device__ F silu_share(F x) { return F(1) / (F(1) + ::exp(-x)); }

  template <int Width>
  __device__ void piece(Index t, Index j) const {
    const auto gates = piece_once_at<Width>(&gate(t, j)), ups = piece_once_at<Width>(&up(t, j));
    F x[Width], by[Width];
    gates.values(x);
    ups.values(by);
    if (activation == Activation::gelu) {
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = x[i] * gelu_share(x[i]) * by[i];
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = x[i] * silu_share(x[i]) * by[i];
    }
    store_piece<Width>(&out(t, j), x);
  }
};

}  // namespace detail

template <>
struct GatedActivation<cuda> {
  template <class A>
  static void forward(Context<cuda>& ctx, Activation activation, Matrix<const A> gate, Matrix<const A> up,
                      Matrix<A> out) {
    const bool whole = detail::in_pieces(gate) && detail::in_pieces(up) && detail::in_pieces(out);
    detail::for_pieces<A>(ctx, whole, out.rows(), out.cols(), detail::GatePiece<A>{activation, gate, up, out},
                          "gated_activation");
  }
};

}  // namespace zamba
