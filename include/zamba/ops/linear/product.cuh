// SPDX-License-Identifier: MIT
// Products of cuBLAS, the same for every head, of which all are queued in one call. What cuBLAS calls a column-major
// matrix is the transpose of one of ours: a view (rows, cols) is handed over as (cols, rows).
//
// cuBLAS chooses one algorithm for extents, types and alignment, whose sums have one order: without atomics, which it
// leaves out unless asked for them, a rerun is bit-equal, on another handle too.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <zamba/context.cuh>
#include <zamba/kernel/vector_load.cuh>
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
  /// What of it, as it is taken, is from this row and column on.
  BlasMatrix from(Index row, Index column) const {
    if (as == CUBLAS_OP_T) std::swap(row, column);
    return {data + row + column * stride, stride, of_head, as};
  }
  /// Whether every column in memory begins at a multiple of 16 bytes.
  bool aligned() const {
    constexpr Index width = vector_width<std::remove_const_t<T>>;
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % width == 0;
  }
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

/// c (m x n) = a (m x k) b (k x n), by one call.
template <class A, class C>
void multiply_all(Context<cuda>& ctx, const char* name, Index heads, Index m, Index n, Index k, BlasMatrix<const A> a,
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

/// c (m x n) = a (m x k) b (k x n), to which c is added where `add` says so: products and sums in compute_t, rounded
/// once.
///
/// In bf16 cuBLAS takes two to eight times as long where columns in memory begin at multiples of 16 bytes, but do not
/// end there. So what long ones have beyond the last is a product of its own; of k it comes first, since a sum of up to
/// 7 products is rounded twice then, not that of all the others.
template <class A, class C>
void multiply(Context<cuda>& ctx, const char* name, Index heads, Index m, Index n, Index k, BlasMatrix<const A> a,
              BlasMatrix<const A> b, BlasMatrix<C> c, bool add) {
  struct Part {
    Index first, count;
  };
  const bool aligned = std::is_same_v<A, bf16> && a.aligned() && b.aligned() && c.aligned();
  const auto parts = [&](Index extent, bool of_column) {
    constexpr Index is_long = 512;
    const Index rest = aligned && of_column && extent >= is_long ? extent % vector_width<A> : 0;
    return std::array<Part, 2>{{{extent - rest, rest}, {0, extent - rest}}};
  };
  for (const Part rows : parts(m, true))
    for (const Part columns : parts(n, b.as == CUBLAS_OP_T)) {
      bool add_to = add;
      for (const Part depth : parts(k, a.as == CUBLAS_OP_T || b.as == CUBLAS_OP_N)) {
        if (rows.count == 0 || columns.count == 0 || (depth.count == 0 && k > 0)) continue;
        multiply_all<A>(ctx, name, heads, rows.count, columns.count, depth.count, a.from(rows.first, depth.first),
                        b.from(depth.first, columns.first), c.from(rows.first, columns.first), add_to);
        add_to = true;
      }
    }
}

}  // namespace zamba::kernel
