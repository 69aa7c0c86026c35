// SPDX-License-Identifier: MIT
// Eigen as host code, under nvcc too: its own support of CUDA would turn vectorisation off there, and one program must
// not hold two versions of the same template.
#pragma once

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

namespace zamba::detail {

/// A view as Eigen sees it.
template <class T>
auto map(Matrix<T> m) {
  using Plain = Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Mapped = std::conditional_t<std::is_const_v<T>, const Plain, Plain>;
  return Eigen::Map<Mapped, Eigen::Unaligned, Eigen::OuterStride<>>(m.data, m.rows(), m.cols(),
                                                                    Eigen::OuterStride<>(m.stride[0]));
}

}  // namespace zamba::detail
