// SPDX-License-Identifier: MIT
// Weight<W>: the weights of a product, as a block holds them, whatever they are stored as.
//
//   template <class W, class F>
//   struct Parameters { Weight<W> in_proj; Vector<F> D; };
//
// Of a plain number it is a Matrix. A type that is none, such as integers with a scale a row, specialises WeightTraits;
// docs/numerics.md walks through one. Blocks, lists of parameters, loaders and savers stay as they are.
#pragma once

#include <cstddef>
#include <type_traits>

#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// How weights of type W lie in memory: row after row, each by itself, so that a file can be read and written in parts.
template <class W>
struct WeightTraits {
  /// What operators read, of rank 2 or 3; Element is W or const W. Another type's view has what Tensor has for reading:
  /// data, by which it is bound to memory as View{data, extents...}; rank, rows(), cols(), size(), [i], slice, columns
  /// and a test on nothing. On the CPU linear and embedding ask it for
  ///   template <class A> kernel::Pack<A> load(Index o, Index k, Index count) const
  /// the weights (o, k) to (o, k + count - 1), at most a register, as A and with zeros beyond. On CUDA embedding asks
  /// for (o, k), one weight as a float, and linear for a specialisation of kernel::LinearKernels (ops/linear.cuh).
  template <class Element, int Rank>
  using View = Tensor<Element, Rank>;

  /// Bytes of a row of `cols` weights.
  static constexpr std::size_t row_bytes(Index cols) { return static_cast<std::size_t>(cols) * sizeof(W); }

  /// A row from double, each weight rounded to nearest, and back.
  static void encode(const double* values, Index cols, std::byte* row) {
    W* to = reinterpret_cast<W*>(row);
    for (Index k = 0; k < cols; ++k) to[k] = static_cast<W>(static_cast<compute_t<W>>(values[k]));
  }
  static void decode(const std::byte* row, Index cols, double* values) {
    const W* from = reinterpret_cast<const W*>(row);
    for (Index k = 0; k < cols; ++k) values[k] = static_cast<double>(from[k]);
  }
};

/// A view of weights (out, in), of rank 3 (heads, out, in), that are stored as W; W may be const.
template <class W, int Rank = 2>
using Weight = typename WeightTraits<std::remove_const_t<W>>::template View<W, Rank>;

namespace detail {

/// Bytes of `size` weights in rows of `cols`.
template <class W>
constexpr std::size_t weight_bytes(Index size, Index cols) {
  return static_cast<std::size_t>(size / cols) * WeightTraits<W>::row_bytes(cols);
}

template <class W>
void encode_rows(const double* values, Index size, Index cols, std::byte* to) {
  const std::size_t bytes = WeightTraits<W>::row_bytes(cols);
  for (Index first = 0; first < size; first += cols, to += bytes) WeightTraits<W>::encode(values + first, cols, to);
}
template <class W>
void decode_rows(const std::byte* from, Index size, Index cols, double* values) {
  const std::size_t bytes = WeightTraits<W>::row_bytes(cols);
  for (Index first = 0; first < size; first += cols, from += bytes) WeightTraits<W>::decode(from, cols, values + first);
}

/// A view for reading only: of a Tensor one of const elements; of another type it is that anyway.
template <class T, int Rank>
constexpr Tensor<const T, Rank> read_only(const Tensor<T, Rank>& weight) {
  return weight;
}
template <class View>
constexpr View read_only(const View& weight) {
  return weight;
}

}  // namespace detail

}  // namespace zamba
