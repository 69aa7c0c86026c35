// SPDX-License-Identifier: MIT
// linear on CUDA; equations and shapes in linear.hpp. Forward:
//
//   1 to 4 tokens      products of a matrix and vectors, see ops/linear/gemv.cuh; in float and double 1 to 8 tokens
//   5 to 32, bf16      tensor cores, see ops/linear/few_tokens.cuh; of large weights from 3 tokens on
//   more               cuBLAS, all heads in one call; also where rows are no multiples of 16 bytes
//
// The first two read the weight once, bound by memory bandwidth. With few tokens the first pieces of the weight are
// read while what was queued before still runs, see launch.cuh: a kernel that is queued just before must not write the
// weight.
//
// Backward: two products by cuBLAS, of which that for d_weight (compute_t) adds to what is there as it writes; and for
// d_bias column sums, see ops/linear/column_sums.cuh.
//
// Numeric contract: products and sums in compute_t, rounded once when written, except that with cuBLAS a bias joins in
// a second rounding, and in bf16 what a long sum in padded rows has beyond a multiple of 8, see ops/linear/product.cuh.
// With each of the first two ways a row of y is the same whichever rows it is computed with: the order of a sum depends
// on the extents of the weight only. With cuBLAS it is what that chooses for these extents; of d_bias it depends on the
// number of tokens. A rerun is bit-equal.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/linear/column_sums.cuh>
#include <zamba/ops/linear/few_tokens.cuh>
#include <zamba/ops/linear/gemv.cuh>
#include <zamba/ops/linear/product.cuh>

namespace zamba {

namespace kernel {

/// What Linear<cuda> calls for a view `Weights` of another type than the activations A: a weight type with kernels of
/// its own specialises it, with Linear<cuda>'s forward, forward_heads and, where they take scratch, scratch; and where
/// gradients go through it, backward_input(ctx, d_y, weight, d_x, accumulate), d_x (n, in) = or += d_y (n, out) W.
template <class A, class Weights>
struct LinearKernels {
  static_assert(zamba::detail::no_version_for<Weights>,
                "zamba::Linear has no kernels on CUDA for weights of this type with activations of that: Types<W, A, "
                "C> wants the same number for both there, or a W with a specialisation of kernel::LinearKernels");
};

template <class A>
struct AddBias {
  Vector<const compute_t<A>> bias;
  Matrix<A> y;

  __device__ void operator()(Index t, Index c) const { y(t, c) = A(compute_t<A>(y(t, c)) + bias[c]); }
};

}  // namespace kernel

template <>
struct Linear<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> weight, Matrix<A> y,
                      Matrix<const A> residual, Vector<const F> bias) {
    if (y.rows() == 0 || y.cols() == 0) return;
    any_number<A>(ctx, split_heads(x, 1), one_head(weight), split_heads(y, 1), residual, bias);
  }

  template <class A, class Weights, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, const Weights& weight, Matrix<A> y,
                      Matrix<const A> residual, Vector<const F> bias) {
    kernel::LinearKernels<A, Weights>::forward(ctx, x, weight, y, residual, bias);
  }

  template <class A>
  static void forward_heads(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y) {
    if (y.size() == 0) return;
    any_number<A>(ctx, x, weight, y, {}, Vector<const compute_t<A>>{});
  }
  template <class A, class Weights>
  static void forward_heads(Context<cuda>& ctx, Tensor<const A, 3> x, const Weights& weight, Tensor<A, 3> y) {
    kernel::LinearKernels<A, Weights>::forward_heads(ctx, x, weight, y);
  }

  template <class A, class Weights, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_y, Matrix<const A> x, const Weights& weight, Matrix<A> d_x,
                       Accumulate accumulate, Matrix<F> d_weight, Vector<F> d_bias) {
    if (d_y.size() == 0) return;
    if (d_x) {
      if constexpr (std::is_same_v<Weights, Matrix<const A>>)
        input_gradient<A>(ctx, split_heads(d_y, 1), one_head(weight), split_heads(d_x, 1), accumulate);
      else
        kernel::LinearKernels<A, Weights>::backward_input(ctx, d_y, weight, d_x, accumulate);
    }
    if (d_weight) weight_gradient<A>(ctx, split_heads(d_y, 1), split_heads(x, 1), one_head(d_weight));
    if (d_bias) kernel::add_column_sums(ctx, d_y, d_bias, "linear_backward: bias");
  }
  /// Of the gradient of a bias.
  template <class Ctx, class A, class Weights, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A> d_y, Matrix<const A>, const Weights&, Matrix<A>, Accumulate,
                               Matrix<F>, Vector<F> d_bias) {
    if (d_bias) kernel::column_sums_scratch(ctx, d_y.rows(), d_bias);
  }

  template <class A, class Weights, class F>
  static void backward_heads(Context<cuda>& ctx, Tensor<const A, 3> d_y, Tensor<const A, 3> x, const Weights& weight,
                             Tensor<A, 3> d_x, Accumulate accumulate, Tensor<F, 3> d_weight) {
    if (d_y.size() == 0) return;
    if (d_x) {
      if constexpr (std::is_same_v<Weights, Tensor<const A, 3>>)
        input_gradient<A>(ctx, d_y, weight, d_x, accumulate);
      else
        for (Index h = 0; h < weight.rows(); ++h)
          kernel::LinearKernels<A, decltype(weight[h])>::backward_input(ctx, head_of(d_y, h), weight[h],
                                                                        head_of(d_x, h), accumulate);
    }
    if (d_weight) weight_gradient<A>(ctx, d_y, x, d_weight);
  }

  template <class Ctx, class A, class F>
  static void scratch(Ctx& ctx, Matrix<const A> x, Matrix<const A> weight, Matrix<A> y, Matrix<const A>,
                      Vector<const F>) {
    scratch(ctx, split_heads(x, 1), one_head(weight), split_heads(y, 1));
  }
  template <class Ctx, class A>
  static void scratch(Ctx& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y) {
    if constexpr (std::is_same_v<A, bf16>)
      if (on_tensor_cores(x, weight, y.rows())) kernel::LinearTiles::scratch(ctx, weight, y.rows());
  }
  template <class Ctx, class A, int Rank, class Weights, class... Rest>
  static void scratch(Ctx& ctx, Tensor<const A, Rank> x, const Weights& weight, Tensor<A, Rank> y,
                      const Rest&... rest) {
    using Kernels = kernel::LinearKernels<A, Weights>;
    if constexpr (requires { Kernels::scratch(ctx, x, weight, y, rest...); })
      Kernels::scratch(ctx, x, weight, y, rest...);
  }

 private:
  /// Tokens of the matrix-vector kernel, at most.
  template <class A>
  static constexpr Index few_tokens = std::is_same_v<A, bf16> ? 4 : 8;

  /// Weights of so many elements or more take less time on tensor cores from 3 tokens on, smaller ones from 5 on.
  static constexpr Index large_weight = Index{1} << 23;
  static bool on_tensor_cores(Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, Index tokens) {
    const Index too_few = weight.size() >= large_weight ? 2 : few_tokens<bf16>;
    return tokens > too_few && kernel::LinearTiles::fit(x, weight, tokens);
  }

  /// y (n, heads, out); with a residual or a bias it is one head.
  template <class A, class F>
  static void any_number(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                         Matrix<const A> residual, Vector<const F> bias) {
    if constexpr (std::is_same_v<A, bf16>)
      if (on_tensor_cores(x, weight, y.rows())) return kernel::LinearTiles::forward(ctx, x, weight, y, residual, bias);
    if (y.rows() <= few_tokens<A>) return few<A>(ctx, x, weight, y, residual, bias);
    many<A>(ctx, x, weight, y, residual, bias);
  }

  /// (out, in) as (1, out, in).
  template <class T>
  static Tensor<T, 3> one_head(Matrix<T> weight) {
    Tensor<T, 3> heads(weight.data, 1, weight.rows(), weight.cols());
    heads.stride[1] = weight.stride[0];
    return heads;
  }

  template <class A, class F>
  static void few(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                  Matrix<const A> residual, Vector<const F> bias) {
    if (y.rows() == 1)
      launch<A, 1>(ctx, x, weight, y, residual, bias);
    else if (y.rows() == 2)
      launch<A, 2>(ctx, x, weight, y, residual, bias);
    else if (y.rows() <= 4)
      launch<A, 4>(ctx, x, weight, y, residual, bias);
    else if constexpr (few_tokens<A> > 4)
      launch<A, 8>(ctx, x, weight, y, residual, bias);
  }

  /// Short rows are for a warp each four, long ones for a block.
  template <class A, int Tokens, class F>
  static void launch(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                     Matrix<const A> residual, Vector<const F> bias) {
    if (x.cols() <= 2 * 32 * kernel::vector_width<A>)
      launch_teams<kernel::LinearGemvTraits<A, Tokens, 1>>(ctx, x, weight, y, residual, bias);
    else
      launch_teams<kernel::LinearGemvTraits<A, Tokens, 8>>(ctx, x, weight, y, residual, bias);
  }

  template <class Traits, class A, class F>
  static void launch_teams(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                           Matrix<const A> residual, Vector<const F> bias) {
    constexpr Index rows = Traits::rows * Traits::teams;
    const dim3 grid(static_cast<unsigned>(ceil_div(weight.shape[1], rows)), static_cast<unsigned>(weight.shape[0]));
    const bool wide = kernel::in_vectors(x) && kernel::in_vectors(weight);
    kernel::launch(ctx, kernel::overlap_for(y.rows()), "linear",
                   wide ? kernel::linear_gemv_kernel<Traits, true> : kernel::linear_gemv_kernel<Traits, false>, grid,
                   Traits::threads, 0, x, weight, y, residual, bias);
  }

  /// y_h^T (out x n) = W_h (out x in) x_h^T (in x n); with a residual or a bias it is one head.
  template <class A, class F>
  static void many(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                   Matrix<const A> residual, Vector<const F> bias) {
    const Index heads = weight.shape[0], out = weight.shape[1];
    if (residual && residual.data != y.data)
      kernel::check_cuda(cudaMemcpy2DAsync(y.data, static_cast<std::size_t>(y.stride[0]) * sizeof(A), residual.data,
                                           static_cast<std::size_t>(residual.stride[0]) * sizeof(A),
                                           static_cast<std::size_t>(out) * sizeof(A),
                                           static_cast<std::size_t>(y.rows()), cudaMemcpyDeviceToDevice, ctx.stream()),
                         "linear: residual");
    kernel::multiply<A>(ctx, "linear: cuBLAS", heads, out, y.rows(), x.cols(),
                        kernel::blas_weights(weight).transposed(), kernel::blas_rows(x), kernel::blas_rows(y),
                        bool(residual));
    if (bias) kernel::for_elements(ctx, y.rows(), out, kernel::AddBias<A>{bias, head_of(y, 0)}, "linear: bias");
  }

  /// d_x_h^T (in x n) = or += W_h^T (in x out) d_y_h^T (out x n)
  template <class A>
  static void input_gradient(Context<cuda>& ctx, Tensor<const A, 3> d_y, Tensor<const A, 3> weight, Tensor<A, 3> d_x,
                             Accumulate accumulate) {
    kernel::multiply<A>(ctx, "linear_backward: input", weight.shape[0], d_x.cols(), d_x.rows(), d_y.cols(),
                        kernel::blas_weights(weight), kernel::blas_rows(d_y), kernel::blas_rows(d_x),
                        accumulate == Accumulate::yes);
  }

  /// d_W_h^T (in x out) += x_h^T (in x n) d_y_h (n x out)
  template <class A, class F>
  static void weight_gradient(Context<cuda>& ctx, Tensor<const A, 3> d_y, Tensor<const A, 3> x, Tensor<F, 3> d_weight) {
    kernel::multiply<A>(ctx, "linear_backward: weight", d_weight.shape[0], x.cols(), d_y.cols(), d_y.rows(),
                        kernel::blas_rows(x), kernel::blas_rows(d_y).transposed(), kernel::blas_weights(d_weight),
                        true);
  }
};

}  // namespace zamba
