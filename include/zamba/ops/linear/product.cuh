// SPDX-License-Identifier: MIT
// Products of cuBLAS, the same for every head, of which all are queued in one call. What cuBLAS calls a column-major
// matrix is the transpose of one of ours: a view (rows, cols) is handed over as (cols, rows).
//
// cuBLAS chooses one algorithm for extents, types and alignment, whose sums have one order: without atomics, which it
// leaves out unless asked for them, a rerun is bit-equal, on another handle too.
#pragma once

#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// A matrix of every head, as cuBLAS takes it: columns `stride` apart, heads `of_head` apart.
template <class T>
struct BlasMatrix {
  T* data;
  Index stride, of_head;
  cublasOperation_t as = CUBLAS_OP_N;

  BlasMatrix transposed() const { return {data, stride, of_head, CUBLAS_OP_T}; }
};

/// Of x (n, heads, width): width x n for every head.
template <class T>
BlasMatrix<T> blas_rows(Tensor<T, 3> x) {
  return {x.data, x.stride[0], x.stride[1]};
}
/// Of weights (heads, out, in): in x out for every head.
template <class T>
BlasMatrix<T> blas_weights(Tensor<T, 3> weight) {
  return {weight.data, weight.stride[1], weight.stride[0]};
}

template <class T>
inline constexpr cudaDataType_t blas_type = std::is_same_v<T, double>  ? CUDA_R_64F
                                            : std::is_same_v<T, float> ? CUDA_R_32F
                                                                       : CUDA_R_16BF;

/// c (m x n) = a (m x k) b (k x n), to which c is added where `add` says so: products and sums in compute_t, rounded
/// once.
template <class A, class C>
void multiply(Context<cuda>& ctx, const char* name, Index heads, Index m, Index n, Index k, BlasMatrix<const A> a,
              BlasMatrix<const A> b, BlasMatrix<C> c, bool add) {
  using F = compute_t<A>;
  constexpr auto compute = std::is_same_v<F, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  const F one = 1, of_c = add ? 1 : 0;
  if (heads == 1)
    check_cublas(
        cublasGemmEx_64(ctx.blas(), a.as, b.as, m, n, k, &one, a.data, blas_type<A>, a.stride, b.data, blas_type<A>,
                        b.stride, &of_c, c.data, blas_type<C>, c.stride, compute, CUBLAS_GEMM_DEFAULT),
        name);
  else
    check_cublas(cublasGemmStridedBatchedEx_64(ctx.blas(), a.as, b.as, m, n, k, &one, a.data, blas_type<A>, a.stride,
                                               a.of_head, b.data, blas_type<A>, b.stride, b.of_head, &of_c, c.data,
                                               blas_type<C>, c.stride, c.of_head, heads, compute, CUBLAS_GEMM_DEFAULT),
                 name);
}

}  // namespace zamba::kernel
