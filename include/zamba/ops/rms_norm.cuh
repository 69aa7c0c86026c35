// SPDX-License-Identifier: MIT
// rms_norm on CUDA; equations and shapes in rms_norm.hpp.
//
// Forward: a block a position, whose threads hold v and their part of the weight in registers, read 16 bytes at a time
// where rows allow; the weight also for the positions that the block takes later. Where a position is too wide for that
// it is read twice. Backward: a block a position for d_x and d_t; d_weight in two more kernels, a thread a column, over
// fixed groups of positions and then over the groups in order.
//
// Numeric contract: sums in compute_t, in an order fixed by the width and the number of positions. Agrees with the CPU
// version to rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when written.
#pragma once

#include <cstdint>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/detail/block_sum.cuh>
#include <zamba/detail/launch.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/rms_norm.hpp>

namespace zamba {

namespace detail {

/// v = x + t, or x where t is absent; its gradient goes to d_x and, where wanted, d_t.
template <class A_>
struct SummedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x, t;
  Matrix<A> d_x, d_t;

  __device__ Index width() const { return x.cols(); }
  __device__ F value(Index i, Index c) const { return F(x(i, c)) + (t ? F(t(i, c)) : F(0)); }
  /// Width neighbouring values from column c on.
  template <int Width>
  __device__ void values(Index i, Index c, F (&to)[Width]) const {
    piece_at<Width>(&x(i, c)).values(to);
    if (!t) return;
    F more[Width];
    piece_at<Width>(&t(i, c)).values(more);
#pragma unroll
    for (int k = 0; k < Width; ++k) to[k] += more[k];
  }
  bool in_pieces() const { return detail::in_pieces(x) && (!t || detail::in_pieces(t)); }
  __device__ void add_gradient(Index i, Index c, F d_v) const {
    d_x(i, c) = A(F(d_x(i, c)) + d_v);
    if (d_t) d_t(i, c) = A(d_v);
  }
};

/// v = concat[a, b]
template <class A_>
struct ConcatenatedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> a, b;
  Matrix<A> d_a, d_b;

  __device__ Index width() const { return a.cols() + b.cols(); }
  __device__ F value(Index i, Index c) const { return c < a.cols() ? F(a(i, c)) : F(b(i, c - a.cols())); }
  template <int Width>
  __device__ void values(Index i, Index c, F (&to)[Width]) const {
    piece_at<Width>(c < a.cols() ? &a(i, c) : &b(i, c - a.cols())).values(to);
  }
  bool in_pieces() const { return detail::in_pieces(a) && detail::in_pieces(b); }
  __device__ void add_gradient(Index i, Index c, F d_v) const {
    A& d = c < a.cols() ? d_a(i, c) : d_b(i, c - a.cols());
    d = A(F(d) + d_v);
  }
};

/// What the kernels of one input type have in common.
template <class Input_>
struct RmsNormTraits {
  using Input = Input_;
  using A = typename Input::A;
  using F = typename Input::F;
  static constexpr int threads = 512;
  static constexpr int held = 16;      // elements of a thread that stay in registers: positions of up to 8192
  static constexpr int columns = 128;  // of d_weight in one block
};

/// For positions of at most threads * Held::value elements. A thread has neighbouring elements of 16 bytes; where Wide,
/// it reads and writes them at once. The order of the sum is the same either way.
template <class Traits, class Held, bool Wide>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_kernel(typename Traits::Input in, Vector<const typename Traits::F> weight, typename Traits::F eps,
                    Matrix<typename Traits::A> out, Vector<typename Traits::F> rstd) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = wide<A>, pieces = Held::value / width;
  let_next_begin();
  const int all = static_cast<int>(in.width());
  const auto column = [](int p) { return (p * Traits::threads + static_cast<int>(threadIdx.x)) * width; };
  F weights[pieces][width] = {};
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    if constexpr (Wide) {
      if (column(p) < all) load_values<width>(&weight[column(p)], weights[p]);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (column(p) + k < all) weights[p][k] = weight[column(p) + k];
    }
  }
  wait_for_previous();
  int turn = 0;
  for (Index i = blockIdx.x; i < out.rows(); i += gridDim.x, turn ^= 1) {
    F held[pieces][width] = {}, squares = 0;
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if constexpr (Wide) {
        if (column(p) < all) in.template values<width>(i, column(p), held[p]);
      } else {
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (column(p) + k < all) held[p][k] = in.value(i, column(p) + k);
      }
    }
#pragma unroll
    for (int p = 0; p < pieces; ++p)
#pragma unroll
      for (int k = 0; k < width; ++k) squares += held[p][k] * held[p][k];
    const F scale = F(1) / ::sqrt(block_sum_in_turn<Traits::threads>(squares, turn) / F(all) + eps);
    if (threadIdx.x == 0) rstd[i] = scale;
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int k = 0; k < width; ++k) held[p][k] = weights[p][k] * (held[p][k] * scale);
      if constexpr (Wide) {
        if (column(p) < all) store_piece<width>(&out(i, column(p)), held[p]);
      } else {
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (column(p) + k < all) out(i, column(p) + k) = A(held[p][k]);
      }
    }
  }
}

/// For positions of any width.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_twice_read_kernel(typename Traits::Input in, Vector<const typename Traits::F> weight,
                               typename Traits::F eps, Matrix<typename Traits::A> out,
                               Vector<typename Traits::F> rstd) {
  using F = typename Traits::F;
  const Index width = in.width();
  for (Index i = blockIdx.x; i < out.rows(); i += gridDim.x) {
    F squares = 0;
    for (Index c = threadIdx.x; c < width; c += Traits::threads) {
      const F v = in.value(i, c);
      squares += v * v;
    }
    const F scale = F(1) / ::sqrt(block_sum<Traits::threads>(squares) / F(width) + eps);
    if (threadIdx.x == 0) rstd[i] = scale;
    for (Index c = threadIdx.x; c < width; c += Traits::threads)
      out(i, c) = typename Traits::A(weight[c] * (in.value(i, c) * scale));
  }
}

/// d_v = rstd * weight * d_out - v * rstd^3 * mean(weight * d_out * v)
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_input_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                   Vector<const typename Traits::F> weight, Vector<const typename Traits::F> rstd) {
  using F = typename Traits::F;
  const Index width = in.width();
  for (Index i = blockIdx.x; i < d_out.rows(); i += gridDim.x) {
    F product = 0;
    for (Index c = threadIdx.x; c < width; c += Traits::threads) product += weight[c] * F(d_out(i, c)) * in.value(i, c);
    const F scale = rstd[i];
    const F shrink = scale * scale * scale * block_sum<Traits::threads>(product) / F(width);
    for (Index c = threadIdx.x; c < width; c += Traits::threads)
      in.add_gradient(i, c, scale * (weight[c] * F(d_out(i, c))) - shrink * in.value(i, c));
  }
}

/// partial (groups, width): each group's sum of d_out * v * rstd, positions in order.
template <class Traits>
__global__ void __launch_bounds__(Traits::columns)
    rms_norm_weight_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                    Vector<const typename Traits::F> rstd, Index group_size,
                                    Matrix<typename Traits::F> partial) {
  using F = typename Traits::F;
  const Index c = Index{blockIdx.x} * Traits::columns + threadIdx.x, group = blockIdx.y;
  if (c >= in.width()) return;
  const Index end = ::min(d_out.rows(), (group + 1) * group_size);
  F sum = 0;
  for (Index i = group * group_size; i < end; ++i) sum += F(d_out(i, c)) * in.value(i, c) * rstd[i];
  partial(group, c) = sum;
}

/// d_weight += the sum of partial (groups, width) over the groups, in order.
template <class F>
__global__ void add_groups_kernel(Matrix<const F> partial, Vector<F> d_weight) {
  const Index c = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= partial.cols()) return;
  F sum = d_weight[c];
  for (Index group = 0; group < partial.rows(); ++group) sum += partial(group, c);
  d_weight[c] = sum;
}

}  // namespace detail

template <>
struct RmsNorm<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> t, Vector<const F> weight, double eps,
                      Matrix<A> out, Vector<F> rstd) {
    launch_forward(ctx, detail::SummedInput<A>{x, t, {}, {}}, weight, eps, out, rstd);
  }

  template <class A, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const A> t,
                       Vector<const F> weight, Vector<const F> rstd, Matrix<A> d_x, Matrix<A> d_t, Vector<F> d_weight) {
    launch_backward(ctx, detail::SummedInput<A>{x, t, d_x, d_t}, d_out, weight, rstd, d_weight);
  }

  template <class A, class F>
  static void concat_forward(Context<cuda>& ctx, Matrix<const A> a, Matrix<const A> b, Vector<const F> weight,
                             double eps, Matrix<A> out, Vector<F> rstd) {
    launch_forward(ctx, detail::ConcatenatedInput<A>{a, b, {}, {}}, weight, eps, out, rstd);
  }

  template <class A, class F>
  static void concat_backward(Context<cuda>& ctx, Matrix<const A> d_out, Matrix<const A> a, Matrix<const A> b,
                              Vector<const F> weight, Vector<const F> rstd, Matrix<A> d_a, Matrix<A> d_b,
                              Vector<F> d_weight) {
    launch_backward(ctx, detail::ConcatenatedInput<A>{a, b, d_a, d_b}, d_out, weight, rstd, d_weight);
  }

 private:
  /// At most this many partial sums of d_weight.
  static constexpr Index groups_at_most = 64;
  /// Blocks of the forward pass: what a GPU holds at a time, so that most of them take several positions.
  static constexpr Index blocks_at_most = 512;

  /// Blocks of about equally many positions.
  static unsigned even_blocks(Index positions) {
    const Index each = (positions + blocks_at_most - 1) / blocks_at_most;
    return static_cast<unsigned>((positions + each - 1) / each);
  }

  template <class Input, class A, class F>
  static void launch_forward(Context<cuda>& ctx, const Input& in, Vector<const F> weight, double eps, Matrix<A> out,
                             Vector<F> rstd) {
    using Traits = detail::RmsNormTraits<Input>;
    if (out.rows() == 0) return;
    const bool whole = in.in_pieces() && detail::in_pieces(out) && detail::aligned(weight, detail::wide<F>);
    using All = std::integral_constant<int, Traits::held>;
    using Half = std::integral_constant<int, Traits::held / 2>;
    if (out.cols() > Traits::threads * All::value) {
      detail::rms_norm_twice_read_kernel<Traits>
          <<<detail::blocks_for(out.rows(), 1), Traits::threads, 0, ctx.stream()>>>(in, weight, static_cast<F>(eps),
                                                                                    out, rstd);
      return detail::check_launch("rms_norm");
    }
    const unsigned blocks = even_blocks(out.rows());
    const auto kernel = !whole                                        ? detail::rms_norm_kernel<Traits, All, false>
                        : out.cols() <= Traits::threads * Half::value ? detail::rms_norm_kernel<Traits, Half, true>
                                                                      : detail::rms_norm_kernel<Traits, All, true>;
    detail::launch(ctx, detail::overlap_for(out.rows()), "rms_norm", kernel, blocks, Traits::threads, 0, in, weight,
                   static_cast<F>(eps), out, rstd);
  }

  template <class Input, class A, class F>
  static void launch_backward(Context<cuda>& ctx, const Input& in, Matrix<const A> d_out, Vector<const F> weight,
                              Vector<const F> rstd, Vector<F> d_weight) {
    using Traits = detail::RmsNormTraits<Input>;
    const Index n = d_out.rows(), width = d_weight.size();
    if (n == 0) return;
    detail::rms_norm_input_gradient_kernel<Traits>
        <<<detail::blocks_for(n, 1), Traits::threads, 0, ctx.stream()>>>(in, d_out, weight, rstd);
    detail::check_launch("rms_norm_backward: input");

    const Index group_size = std::max(Index{8}, (n + groups_at_most - 1) / groups_at_most);
    const Index groups = (n + group_size - 1) / group_size;
    const unsigned across = detail::blocks_for(width, Traits::columns);
    ArenaScope scope(ctx.arena());
    const auto partial = ctx.arena().template tensor<F>(groups, width);
    detail::rms_norm_weight_gradient_kernel<Traits>
        <<<dim3(across, static_cast<unsigned>(groups)), Traits::columns, 0, ctx.stream()>>>(in, d_out, rstd, group_size,
                                                                                            partial);
    detail::add_groups_kernel<F><<<across, Traits::columns, 0, ctx.stream()>>>(partial, d_weight);
    detail::check_launch("rms_norm_backward: weight");
  }
};

}  // namespace zamba
