// SPDX-License-Identifier: MIT
// gated_rms_norm on CUDA, forward; equations and shapes in gated_rms_norm.hpp.
//
// A block takes a group of a position, and reads and writes 16 bytes a lane where the views allow it. Gated inputs stay
// in registers, or are computed twice where a group is too wide.
//
// Numeric contract: as rms_norm on CUDA.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/block_sum.cuh>
#include <zamba/detail/launch.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/gated_rms_norm.hpp>

namespace zamba {

namespace detail {

/// Width_: neighbouring elements that a thread takes at once.
template <class A_, int Width_>
struct GatedRmsNormTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 256, width = Width_;
  static constexpr int held = 32 / width;  // pieces of a thread that stay in registers: groups of up to 8192
  template <class T>
  struct alignas(width == 1 ? sizeof(T) : 16) Piece {
    T of[width];
  };

  __device__ static Piece<F> gated(Matrix<const A> x, Matrix<const A> z, Index i, Index c) {
    const auto x_c = *reinterpret_cast<const Piece<A>*>(&x(i, c)), z_c = *reinterpret_cast<const Piece<A>*>(&z(i, c));
    Piece<F> v;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const F gate = F(z_c.of[k]);
      v.of[k] = F(x_c.of[k]) * gate / (F(1) + ::exp(-gate));
    }
    return v;
  }
  __device__ static F squares(const Piece<F>& v) {
    F sum = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) sum += v.of[k] * v.of[k];
    return sum;
  }
  __device__ static void write(const Piece<F>& v, F scale, const F* weight, A* out) {
    const auto w = *reinterpret_cast<const Piece<F>*>(weight);
    Piece<A> to;
#pragma unroll
    for (int k = 0; k < width; ++k) to.of[k] = A(w.of[k] * (v.of[k] * scale));
    *reinterpret_cast<Piece<A>*>(out) = to;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    gated_rms_norm_kernel(Matrix<const typename Traits::A> x, Matrix<const typename Traits::A> z,
                          Vector<const typename Traits::F> weight, typename Traits::F eps,
                          Matrix<typename Traits::A> out, Matrix<typename Traits::F> rstd) {
  using F = typename Traits::F;
  using Piece = typename Traits::template Piece<F>;
  let_next_begin();
  wait_for_previous();
  const Index groups = rstd.cols(), width = out.cols() / groups;
  const Index mine = Index{threadIdx.x} * Traits::width, step = Traits::threads * Traits::width;
  const bool holds = width <= step * Traits::held;
  for (Index task = blockIdx.x; task < out.rows() * groups; task += gridDim.x) {
    const Index i = task / groups, group = task % groups, first = group * width;
    F squares = 0;
    Piece held[Traits::held];
    if (holds) {
#pragma unroll
      for (int k = 0; k < Traits::held; ++k) {
        const Index c = mine + k * step;
        held[k] = c < width ? Traits::gated(x, z, i, first + c) : Piece{};
      }
#pragma unroll
      for (int k = 0; k < Traits::held; ++k) squares += Traits::squares(held[k]);
    } else {
      for (Index c = mine; c < width; c += step) squares += Traits::squares(Traits::gated(x, z, i, first + c));
    }
    const F scale = F(1) / ::sqrt(block_sum<Traits::threads>(squares) / F(width) + eps);
    if (threadIdx.x == 0) rstd(i, group) = scale;
    if (holds) {
#pragma unroll
      for (int k = 0; k < Traits::held; ++k) {
        const Index c = mine + k * step;
        if (c < width) Traits::write(held[k], scale, &weight[first + c], &out(i, first + c));
      }
    } else {
      for (Index c = mine; c < width; c += step)
        Traits::write(Traits::gated(x, z, i, first + c), scale, &weight[first + c], &out(i, first + c));
    }
  }
}

}  // namespace detail

template <>
struct GatedRmsNorm<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> z, Vector<const F> weight, double eps,
                      Matrix<A> out, Matrix<F> rstd) {
    if (out.rows() == 0) return;
    constexpr int wide = detail::wide<A>;
    if (out.cols() / rstd.cols() % wide == 0 && detail::aligned(x, wide) && detail::aligned(z, wide) &&
        detail::aligned(out, wide) && detail::aligned(weight, detail::wide<F>))
      launch<wide>(ctx, x, z, weight, eps, out, rstd);
    else
      launch<1>(ctx, x, z, weight, eps, out, rstd);
  }

 private:
  template <int Width, class A, class F>
  static void launch(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> z, Vector<const F> weight, double eps,
                     Matrix<A> out, Matrix<F> rstd) {
    using Traits = detail::GatedRmsNormTraits<A, Width>;
    detail::launch(ctx, "gated_rms_norm", detail::gated_rms_norm_kernel<Traits>,
                   detail::blocks_for(out.rows() * rstd.cols(), 1), Traits::threads, 0, x, z, weight,
                   static_cast<F>(eps), out, rstd);
  }
};

}  // namespace zamba
