// SPDX-License-Identifier: MIT
// Eigen as host code, under nvcc too: its own support of CUDA would turn vectorisation off there, and one program must
// not hold two versions of the same template.
#pragma once

#include <algorithm>
#include <type_traits>

#ifndef EIGEN_NO_CUDA
#define EIGEN_NO_CUDA
#endif
// g++ 12 takes the undefined registers of its own AVX-512 intrinsics for mistakes wherever Eigen's kernels are inlined.
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <Eigen/Core>
#pragma GCC diagnostic pop

#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// A view as Eigen sees it.
template <class T>
auto map(Matrix<T> m) {
  using Plain = Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Mapped = std::conditional_t<std::is_const_v<T>, const Plain, Plain>;
  return Eigen::Map<Mapped, Eigen::Unaligned, Eigen::OuterStride<>>(m.data, m.rows(), m.cols(),
                                                                    Eigen::OuterStride<>(m.stride[0]));
}

/// A matrix in a product: as it lies, or its transpose.
template <class A, int Order>
struct Factor {
  const A* data;
  Index stride, rows, cols;

  A operator()(Index i, Index k) const { return data[Order == Eigen::RowMajor ? i * stride + k : k * stride + i]; }
};

template <class T>
Factor<std::remove_const_t<T>, Eigen::RowMajor> factor(Matrix<T> m) {
  return {m.data, m.stride[0], m.rows(), m.cols()};
}
template <class A, int Order>
Factor<A, Order> factor(const Factor<A, Order>& f) {
  return f;
}
template <class T>
Factor<std::remove_const_t<T>, Eigen::ColMajor> transposed(Matrix<T> m) {
  return {m.data, m.stride[0], m.cols(), m.rows()};
}

/// A count of elements, rounded up to whole cache lines: there scratch begins, whichever worker's it is, as Eigen sums
/// in an order that depends on alignment.
constexpr Index padded_to_line(Index count) { return ceil_div(count, 16) * 16; }

/// Where Eigen's product copies its factors to, block by block, in the order in which it reads them. Left to itself it
/// would allocate that on every call, and fail inside of a parallel region.
template <class A>
class ProductBlocks : public Eigen::internal::level3_blocking<A, A> {
  using Traits = Eigen::internal::gebp_traits<A, A>;
  static_assert(Traits::mr <= 64 && Traits::nr <= 64);

  /// Elements of a block at most; Eigen seldom wants more.
  static constexpr Index most = Index{1} << 18;
  static Index fitting(Index extent, Index depth, Index multiple) {
    return std::min(extent, most / depth / multiple * multiple);
  }

 public:
  /// Elements that the blocks of products of up to these extents take: a multiple of 16.
  static constexpr Index size(Index rows, Index depth, Index cols) {
    return padded_to_line(std::min(rows * depth, most)) + padded_to_line(std::min(cols * depth, most));
  }

  ProductBlocks(Index rows, Index depth, Index cols, A* memory) {
    Index k = depth, m = cols, n = rows;  // of the transpose, which is what Eigen computes for a row-major result
    Eigen::internal::computeProductBlockingSizes<A, A>(k, m, n);
    this->m_kc = std::min(k, most / 64);
    this->m_mc = fitting(m, this->m_kc, Traits::mr);
    this->m_nc = fitting(n, this->m_kc, Traits::nr);
    this->m_blockA = memory;
    this->m_blockB = memory + padded_to_line(std::min(cols * depth, most));
  }
};

/// Elements of scratch that add_product takes for (rows, depth) times (depth, cols), or less of any.
template <class A>
constexpr Index product_scratch(Index rows, Index depth, Index cols) {
  return ProductBlocks<A>::size(rows, depth, cols);
}

/// y += left right, where a factor is a Matrix or transposed(Matrix). scratch: product_scratch of the extents, aligned
/// to 64 bytes. Allocates nothing and throws nothing.
template <class A, class Left, class Right>
void add_product(Matrix<A> y, const Left& left, const Right& right, A* scratch) {
  const auto a = factor(left);
  const auto b = factor(right);
  const Index rows = y.rows(), cols = y.cols(), depth = a.cols;
  if (rows + cols + depth < 20) {  // less work than to begin with blocks
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j) {
        A sum = 0;
        for (Index k = 0; k < depth; ++k) sum += a(i, k) * b(k, j);
        y(i, j) += sum;
      }
    return;
  }
  if (rows == 0 || cols == 0 || depth == 0) return;
  const auto order = []<int Order>(const Factor<A, Order>&) { return std::integral_constant<int, Order>{}; };
  ProductBlocks<A> blocks(rows, depth, cols, scratch);
  Eigen::internal::general_matrix_matrix_product<Index, A, decltype(order(a))::value, false, A,
                                                 decltype(order(b))::value, false, Eigen::RowMajor,
                                                 1>::run(rows, cols, depth, a.data, a.stride, b.data, b.stride, y.data,
                                                         1, y.stride[0], A(1), blocks, nullptr);
}

/// y = left right.
template <class A, class Left, class Right>
void set_product(Matrix<A> y, const Left& left, const Right& right, A* scratch) {
  for (Index i = 0; i < y.rows(); ++i) std::fill_n(y.data + i * y.stride[0], y.cols(), A(0));
  add_product(y, left, right, scratch);
}

}  // namespace zamba::kernel
