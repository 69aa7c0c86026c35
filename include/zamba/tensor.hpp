// SPDX-License-Identifier: MIT
// Tensor<T, Rank>: a non-owning, row-major, strided view; and the glossary of shapes.
//
//   glossary of extents (in comments beside every view)
//     tokens   positions of all rows of a ragged batch, one row's after the other's: there is no padding
//     rows     sequences in a batch; row r owns tokens [offsets[r], offsets[r + 1])
//     d        d_model, the width of the residual stream
//     D        d_inner = expand * d, the channels of a Mamba mixer; H heads of P = D / H
//     N        d_state, the recurrent state of one channel
//     R        dt_rank
//     K        d_conv, the width of the causal convolution
//     V        vocabulary
#pragma once

#include <type_traits>

#include <zamba/checked.hpp>
#include <zamba/device.hpp>

namespace zamba {

/// A view of Rank extents; the last one is contiguous, the others have a stride in elements.
/// Copying copies the view. It owns nothing and, but for a checked build (checked.hpp), checks nothing: extents are
/// checked where data enters the library.
template <class T, int Rank>
struct Tensor {
  static_assert(Rank >= 1 && Rank <= 4, "zamba::Tensor: the rank must be 1 to 4");

  T* data = nullptr;
  Index shape[std::size_t{Rank}] = {};
  Index stride[std::size_t{Rank}] = {};

  constexpr Tensor() = default;

  /// A contiguous view of `data` with the given extents.
  template <class... Extents>
    requires(sizeof...(Extents) == Rank && (std::is_convertible_v<Extents, Index> && ...))
  ZAMBA_HOST_DEVICE constexpr Tensor(T* pointer, Extents... extents)
      : data(pointer), shape{static_cast<Index>(extents)...} {
    Index next = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      ZAMBA_CHECK(shape[i] >= 0, "Tensor: extent ", i, " is ", shape[i], ", wanted 0 or more");
      stride[i] = next;
      next *= shape[i];
    }
  }

  /// Tensor<T> to Tensor<const T>.
  template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
  ZAMBA_HOST_DEVICE constexpr Tensor(const Tensor<U, Rank>& other) : data(other.data) {
    for (int i = 0; i < Rank; ++i) {
      shape[i] = other.shape[i];
      stride[i] = other.stride[i];
    }
  }

  /// False for a view of nothing: an optional argument that was not given.
  ZAMBA_HOST_DEVICE constexpr explicit operator bool() const { return data != nullptr; }

  ZAMBA_HOST_DEVICE constexpr Index rows() const { return shape[0]; }
  ZAMBA_HOST_DEVICE constexpr Index cols() const { return shape[Rank - 1]; }
  ZAMBA_HOST_DEVICE constexpr Index size() const {
    Index n = 1;
    for (int i = 0; i < Rank; ++i) n *= shape[i];
    return n;
  }

  /// The element at the given position.
  template <class... Positions>
    requires(sizeof...(Positions) == Rank)
  ZAMBA_HOST_DEVICE constexpr T& operator()(Positions... positions) const {
    const Index at[] = {static_cast<Index>(positions)...};
    Index offset = 0;
    for (int i = 0; i < Rank; ++i) {
      ZAMBA_CHECK(at[i] >= 0 && at[i] < shape[i], "Tensor: position ", at[i], " is outside extent ", i, ", which is ",
                  shape[i]);
      offset += at[i] * stride[i];
    }
    return data[offset];
  }

  /// The sub-view at position i of the first extent; the element itself at rank 1.
  ZAMBA_HOST_DEVICE constexpr decltype(auto) operator[](Index i) const {
    ZAMBA_CHECK(i >= 0 && i < shape[0], "Tensor: position ", i, " is outside extent 0, which is ", shape[0]);
    if constexpr (Rank == 1) {
      return static_cast<T&>(data[i]);
    } else {
      Tensor<T, Rank - 1> sub;
      sub.data = data + i * stride[0];
      for (int k = 1; k < Rank; ++k) {
        sub.shape[k - 1] = shape[k];
        sub.stride[k - 1] = stride[k];
      }
      return sub;
    }
  }

  /// All elements in one extent, or all but the last extent merged; only of a contiguous view.
  ZAMBA_HOST_DEVICE constexpr Tensor<T, 1> flat() const {
    ZAMBA_CHECK(contiguous(), "Tensor: flat() of a view that is not contiguous");
    return {data, size()};
  }
  ZAMBA_HOST_DEVICE constexpr Tensor<T, 2> as_matrix() const {
    ZAMBA_CHECK(contiguous(), "Tensor: as_matrix() of a view that is not contiguous");
    Index all = 1;
    for (int i = 0; i < Rank - 1; ++i) all *= shape[i];
    return {data, all, cols()};
  }
  ZAMBA_HOST_DEVICE constexpr bool contiguous() const {
    Index next = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      if (shape[i] > 1 && stride[i] != next) return size() == 0;
      next *= shape[i];
    }
    return true;
  }

  /// Positions [first, first + count) of the first extent; a view of nothing stays one.
  ZAMBA_HOST_DEVICE constexpr Tensor slice(Index first, Index count) const {
    ZAMBA_CHECK(!data || (first >= 0 && count >= 0 && first <= shape[0] - count), "Tensor: positions [", first, ", ",
                first + count, ") are outside extent 0, which is ", shape[0]);
    Tensor part = *this;
    if (data) part.data = data + first * stride[0];
    part.shape[0] = count;
    return part;
  }

  /// Positions [first, first + count) of the last extent; a view of nothing stays one.
  ZAMBA_HOST_DEVICE constexpr Tensor columns(Index first, Index count) const {
    ZAMBA_CHECK(!data || (first >= 0 && count >= 0 && first <= shape[Rank - 1] - count), "Tensor: positions [", first,
                ", ", first + count, ") are outside extent ", Rank - 1, ", which is ", shape[Rank - 1]);
    Tensor part = *this;
    if (data) part.data = data + first;
    part.shape[Rank - 1] = count;
    return part;
  }
};

template <class T>
using Vector = Tensor<T, 1>;
template <class T>
using Matrix = Tensor<T, 2>;

/// (n, heads * width) as (n, heads, width).
template <class T>
ZAMBA_HOST_DEVICE constexpr Tensor<T, 3> split_heads(Matrix<T> x, Index heads) {
  ZAMBA_CHECK(heads > 0 && x.cols() % heads == 0, "split_heads: ", x.cols(), " columns in ", heads, " heads");
  Tensor<T, 3> split(x.data, x.rows(), heads, x.cols() / heads);
  split.stride[0] = x.stride[0];
  return split;
}

/// Head `head` of (n, heads, width), (n, width).
template <class T>
ZAMBA_HOST_DEVICE constexpr Matrix<T> head_of(Tensor<T, 3> x, Index head) {
  ZAMBA_CHECK(head >= 0 && head < x.shape[1], "head_of: head ", head, " of ", x.shape[1]);
  Matrix<T> of(x.data + head * x.stride[1], x.shape[0], x.shape[2]);
  of.stride[0] = x.stride[0];
  return of;
}

}  // namespace zamba
