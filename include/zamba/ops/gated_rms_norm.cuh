// SPDX-License-Identifier: MIT
// gated_rms_norm on CUDA, forward; equations and shapes in gated_rms_norm.hpp. The kernels are those of rms_norm, with
// a gated input; one that is read twice is also gated twice.
//
// Numeric contract: as rms_norm on CUDA; in float silu(z) is within (3 + |z|) 1e-7 of its value.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/gated_rms_norm.hpp>
#include <zamba/ops/rms_norm.cuh>

namespace zamba {

namespace kernel {

/// v = x silu(z), of groups of so many channels.
template <class A_>
struct GatedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x, z;
  Index group;

  __device__ Index width() const { return group; }
  __device__ F value(Index i, Index c) const { return F(x(i, c)) * silu(F(z(i, c))); }
  static constexpr int pieces = 2;
  template <class Bring>
  __device__ void bring(Index i, Index c, Bring&& bring) const {
    bring(0, &x(i, c));
    bring(1, &z(i, c));
  }
  template <class Brought>
  __device__ void values(Brought&& piece, F (&to)[vector_width<A>]) const {
    F gate[vector_width<A>];
    piece(0).unpack(to);
    piece(1).unpack(gate);
#pragma unroll
    for (int k = 0; k < vector_width<A>; ++k) to[k] *= silu(gate[k]);
  }
  bool in_vectors() const { return kernel::in_vectors(x) && kernel::in_vectors(z); }
};

}  // namespace kernel

template <>
struct GatedRmsNorm<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> z, Vector<const F> weight, double eps,
                      Matrix<A> out, Matrix<F> rstd) {
    kernel::launch_norm(ctx, kernel::GatedInput<A>{x, z, out.cols() / rstd.cols()}, weight, eps, out, rstd,
                        "gated_rms_norm");
  }
};

}  // namespace zamba
