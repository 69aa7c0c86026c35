// SPDX-License-Identifier: MIT
// gated_rms_norm on CUDA, forward; equations and shapes in gated_rms_norm.hpp. A block takes a group of a position.
//
// Numeric contract: as rms_norm on CUDA.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/block_sum.cuh>
#include <zamba/ops/gated_rms_norm.hpp>

namespace zamba {

namespace detail {

template <class A_>
struct GatedRmsNormTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 256;

  __device__ static F gated(Matrix<const A> x, Matrix<const A> z, Index i, Index c) {
    const F gate = F(z(i, c));
    return F(x(i, c)) * gate / (F(1) + ::exp(-gate));
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    gated_rms_norm_kernel(Matrix<const typename Traits::A> x, Matrix<const typename Traits::A> z,
                          Vector<const typename Traits::F> weight, typename Traits::F eps,
                          Matrix<typename Traits::A> out, Matrix<typename Traits::F> rstd) {
  using F = typename Traits::F;
  const Index groups = rstd.cols(), width = out.cols() / groups;
  for (Index task = blockIdx.x; task < out.rows() * groups; task += gridDim.x) {
    const Index i = task / groups, group = task % groups, first = group * width;
    F squares = 0;
    for (Index c = first + threadIdx.x; c < first + width; c += Traits::threads) {
      const F v = Traits::gated(x, z, i, c);
      squares += v * v;
    }
    const F scale = F(1) / ::sqrt(block_sum<Traits::threads>(squares) / F(width) + eps);
    if (threadIdx.x == 0) rstd(i, group) = scale;
    for (Index c = first + threadIdx.x; c < first + width; c += Traits::threads)
      out(i, c) = typename Traits::A(weight[c] * (Traits::gated(x, z, i, c) * scale));
  }
}

}  // namespace detail

template <>
struct GatedRmsNorm<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> z, Vector<const F> weight, double eps,
                      Matrix<A> out, Matrix<F> rstd) {
    using Traits = detail::GatedRmsNormTraits<A>;
    if (out.rows() == 0) return;
    detail::gated_rms_norm_kernel<Traits>
        <<<detail::blocks_for(out.rows() * rstd.cols(), 1), Traits::threads, 0, ctx.stream()>>>(
            x, z, weight, static_cast<F>(eps), out, rstd);
    detail::check_launch("gated_rms_norm");
  }
};

}  // namespace zamba
