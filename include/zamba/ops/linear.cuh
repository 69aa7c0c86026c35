// SPDX-License-Identifier: MIT
// linear on CUDA, forward; equations and shapes in linear.hpp.
//
//   few tokens (decode)   a block takes four rows of the weight, which are read once, 16 bytes a lane; its warps share
//                         the columns. Bound by memory bandwidth
//   many tokens           cuBLAS
//
// Numeric contract: products and sums in compute_t, rounded once when written, except that a bias joins many tokens in
// a second rounding. With few tokens a row of y is the same whichever rows it is computed with; with many it is what
// cuBLAS chooses for these extents. A rerun is bit-equal.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/linear.hpp>

namespace zamba {

namespace detail {

/// Weights of A_, of which a block takes four rows for up to Tokens_ tokens.
template <class A_, int Tokens_>
struct LinearTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int rows = 4, tokens = Tokens_;
  static constexpr int threads = 256, warps = threads / 32;
  static constexpr int width = wide<A>;  // elements of one load
};

/// Blocks across: rows of the weight; down: heads. Wide: rows begin at multiples of 16 bytes and are whole numbers of
/// them.
template <class Traits, bool Wide>
__global__ void __launch_bounds__(Traits::threads)
    linear_kernel(Tensor<const typename Traits::A, 3> x_heads, Tensor<const typename Traits::A, 3> weight_heads,
                  Tensor<typename Traits::A, 3> y_heads, Matrix<const typename Traits::A> residual,
                  Vector<const typename Traits::F> bias) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  const Index head = blockIdx.y;
  const auto x = head_of(x_heads, head), weight = weight_heads[head];
  const auto y = head_of(y_heads, head);
  constexpr int rows = Traits::rows, tokens = Traits::tokens, width = Wide ? Traits::width : 1;
  __shared__ F of_warps[Traits::warps][rows * tokens];
  const Index first = Index{blockIdx.x} * rows;
  const A* w[rows];
  const A* in[tokens];
#pragma unroll
  for (int r = 0; r < rows; ++r) w[r] = weight.data + ::min(first + r, weight.rows() - 1) * weight.stride[0];
#pragma unroll
  for (int s = 0; s < tokens; ++s) in[s] = x.data + ::min(Index{s}, x.rows() - 1) * x.stride[0];

  F sum[rows][tokens] = {};
  for (Index k = threadIdx.x * width; k < x.cols(); k += Traits::threads * width) {
    F weights[rows][width];
#pragma unroll
    for (int r = 0; r < rows; ++r) load_piece<width>(w[r] + k, weights[r]);
#pragma unroll
    for (int s = 0; s < tokens; ++s) {
      F inputs[width];
      load_piece<width>(in[s] + k, inputs);
#pragma unroll
      for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int i = 0; i < width; ++i) sum[r][s] += weights[r][i] * inputs[i];
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int s = 0; s < tokens; ++s) {
      for (int distance = 16; distance > 0; distance /= 2)
        sum[r][s] += __shfl_xor_sync(0xffffffffu, sum[r][s], distance);
      if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][r * tokens + s] = sum[r][s];
    }
  __syncthreads();
  const Index out = first + threadIdx.x / tokens, token = threadIdx.x % tokens;
  if (threadIdx.x >= rows * tokens || out >= weight.rows() || token >= y.rows()) return;
  F total = bias ? bias[out] : F(0);
#pragma unroll
  for (int warp = 0; warp < Traits::warps; ++warp) total += of_warps[warp][threadIdx.x];
  y(token, out) = A(residual ? total + F(residual(token, out)) : total);
}

template <class A>
struct AddBias {
  Vector<const compute_t<A>> bias;
  Matrix<A> y;

  __device__ void operator()(Index t, Index c) const { y(t, c) = A(compute_t<A>(y(t, c)) + bias[c]); }
};

}  // namespace detail

template <>
struct Linear<cuda> {
  template <class A, class W, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const W> weight, Matrix<A> y,
                      Matrix<const A> residual, Vector<const F> bias) {
    static_assert(std::is_same_v<A, W>, "zamba: on CUDA activations are of the type of the weights");
    if (y.rows() == 0 || y.cols() == 0) return;
    if (y.rows() <= few_tokens)
      few<A>(ctx, split_heads(x, 1), one_head(weight), split_heads(y, 1), residual, bias);
    else
      many<A>(ctx, x, weight, y, residual, bias);
  }

  template <class A, class W>
  static void forward_heads(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const W, 3> weight, Tensor<A, 3> y) {
    static_assert(std::is_same_v<A, W>, "zamba: on CUDA activations are of the type of the weights");
    if (y.size() == 0) return;
    if (y.rows() <= few_tokens)
      few<A>(ctx, x, weight, y, {}, Vector<const compute_t<A>>{});
    else
      for (Index h = 0; h < weight.shape[0]; ++h)
        many<A>(ctx, head_of(x, h), weight[h], head_of(y, h), {}, Vector<const compute_t<A>>{});
  }

 private:
  static constexpr Index few_tokens = 8;

  /// (out, in) as (1, out, in).
  template <class A>
  static Tensor<const A, 3> one_head(Matrix<const A> weight) {
    Tensor<const A, 3> heads(weight.data, 1, weight.rows(), weight.cols());
    heads.stride[1] = weight.stride[0];
    return heads;
  }

  template <class A, class F>
  static void few(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                  Matrix<const A> residual, Vector<const F> bias) {
    if (y.rows() == 1)
      launch<detail::LinearTraits<A, 1>>(ctx, x, weight, y, residual, bias);
    else if (y.rows() == 2)
      launch<detail::LinearTraits<A, 2>>(ctx, x, weight, y, residual, bias);
    else if (y.rows() <= 4)
      launch<detail::LinearTraits<A, 4>>(ctx, x, weight, y, residual, bias);
    else
      launch<detail::LinearTraits<A, 8>>(ctx, x, weight, y, residual, bias);
  }

  template <class Traits, class A, class F>
  static void launch(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                     Matrix<const A> residual, Vector<const F> bias) {
    const dim3 grid(static_cast<unsigned>((weight.shape[1] + Traits::rows - 1) / Traits::rows),
                    static_cast<unsigned>(weight.shape[0]));
    if (in_pieces<Traits>(x) && in_pieces<Traits>(weight))
      detail::linear_kernel<Traits, true><<<grid, Traits::threads, 0, ctx.stream()>>>(x, weight, y, residual, bias);
    else
      detail::linear_kernel<Traits, false><<<grid, Traits::threads, 0, ctx.stream()>>>(x, weight, y, residual, bias);
    detail::check_launch("linear");
  }

  template <class Traits, class A>
  static bool in_pieces(Tensor<const A, 3> m) {
    return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.cols() % Traits::width == 0 &&
           m.stride[0] % Traits::width == 0 && m.stride[1] % Traits::width == 0;
  }

  template <class A>
  static constexpr cudaDataType_t type_of = std::is_same_v<A, double>  ? CUDA_R_64F
                                            : std::is_same_v<A, float> ? CUDA_R_32F
                                                                       : CUDA_R_16BF;

  /// In cuBLAS's column-major terms: y^T (out, n) = W (out, in) x^T (in, n).
  template <class A, class F>
  static void many(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> weight, Matrix<A> y, Matrix<const A> residual,
                   Vector<const F> bias) {
    if (residual && residual.data != y.data)
      detail::check_cuda(cudaMemcpy2DAsync(y.data, static_cast<std::size_t>(y.stride[0]) * sizeof(A), residual.data,
                                           static_cast<std::size_t>(residual.stride[0]) * sizeof(A),
                                           static_cast<std::size_t>(y.cols()) * sizeof(A),
                                           static_cast<std::size_t>(y.rows()), cudaMemcpyDeviceToDevice, ctx.stream()),
                         "linear: residual");
    const F one = 1, of_residual = residual ? 1 : 0;
    detail::check_cublas(
        cublasGemmEx_64(ctx.blas(), CUBLAS_OP_T, CUBLAS_OP_N, y.cols(), y.rows(), x.cols(), &one, weight.data,
                        type_of<A>, weight.stride[0], x.data, type_of<A>, x.stride[0], &of_residual, y.data, type_of<A>,
                        y.stride[0], std::is_same_v<F, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                        CUBLAS_GEMM_DEFAULT),
        "linear: cublasGemmEx");
    if (bias) detail::for_elements(ctx, y.rows(), y.cols(), detail::AddBias<A>{bias, y}, "linear: bias");
  }
};

}  // namespace zamba
