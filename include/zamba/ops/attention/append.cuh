// SPDX-License-Identifier: MIT
// Where new keys and values join their caches: a kernel of its own before a prefill, or within the decode kernel, which
// reads them next.
#pragma once

#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Puts Width keys or values of a token at its position of the caches.
template <class A_, class S_, int Width_>
struct AppendToCache {
  using A = A_;
  using S = S_;
  static constexpr int width = Width_;
  Matrix<const A> k, v;
  Sequences sequences;
  Tensor<S, 3> cache_k, cache_v;

  /// Vectors of keys, then of values.
  __device__ void operator()(Index t, Index vector) const {
    if (t >= sequences.begin(sequences.rows)) return;
    const Index row = row_of(sequences, t), position = sequences.start(row) + t - sequences.begin(row);
    const Index c = vector * width;
    if (c < k.cols())
      put(k, cache_k, t, row, position, c);
    else
      put(v, cache_v, t, row, position, c - k.cols());
  }

  /// Piece i of the keys, then of the values, of one head.
  __device__ void head(int i, int head_dim, int kv_head, Index t, Index row, Index position) const {
    const int c = i * width;
    if (c < head_dim)
      put(k, cache_k, t, row, position, Index{kv_head} * head_dim + c);
    else
      put(v, cache_v, t, row, position, Index{kv_head} * head_dim + c - head_dim);
  }

  static __device__ void put(const Matrix<const A>& from, const Tensor<S, 3>& to, Index t, Index row, Index position,
                             Index c) {
    if constexpr (width == 1)
      to(row, position, c) = S(compute_t<A>(from(t, c)));
    else
      store_vector(&to(row, position, c), load_vector<width>(&from(t, c)));
  }
};

}  // namespace zamba::kernel
