// SPDX-License-Identifier: MIT
// What prefill and backward of attention on the CPU share: where a row's keys and values are, and tiles of queries. A
// task takes one key head and a tile of tokens; the queries of the group's heads are stacked, so that one product
// serves all of them.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/error.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/ops/attention/shape.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Where the keys and values of a row and a key head are; position j is at k + j * k_stride.
template <class S>
struct RowKeys {
  const S *k, *v;
  Index k_stride, v_stride;
  Index past;  // the position of the row's first token
};

/// The keys of rows that attend to their own tokens.
template <class S_>
struct OwnKeys {
  using S = S_;
  Matrix<const S> k, v;
  const Sequences& sequences;

  RowKeys<S> operator()(Index row, Index column) const {
    const Index first = sequences.begin(row);
    return {&k(first, column), &v(first, column), k.stride[0], v.stride[0], 0};
  }
};

/// The keys of rows that attend to a cache.
template <class S_>
struct CachedKeys {
  using S = S_;
  Tensor<const S, 3> k, v;
  const Sequences& sequences;

  RowKeys<S> operator()(Index row, Index column) const {
    return {&k(row, 0, column), &v(row, 0, column), k.stride[1], v.stride[1], sequences.start(row)};
  }
};

/// The division of a batch into tiles.
struct AttentionTiling {
  /// Queries (tokens times heads of a group) of one product, where a group has not more.
  static constexpr Index most_queries = 64;
  /// Keys of one product.
  static constexpr Index keys = 512;

  Index group, tokens, rows, per_row;  // heads of a group; tokens and queries of a tile; tiles of the longest row

  AttentionTiling(const AttentionShape& shape, const Sequences& sequences) : group(shape.heads / shape.kv_heads) {
    require(group * shape.kv_heads == shape.heads, "attention: heads must be a multiple of kv_heads, got ", shape.heads,
            " and ", shape.kv_heads);
    const Index most = std::max(Index{1}, most_queries / group);
    tokens = std::clamp(sequences.longest, Index{1}, most);
    rows = tokens * group;
    per_row = ceil_div(sequences.longest, tokens);
  }
};

/// Consecutive tokens of a row with the heads of one group: query r is head r % group of token r / group.
struct AttentionTile {
  Index first;                   // the first token, in the batch
  Index tokens;                  // at least 1
  Index group, heads, head_dim;  // heads: the group's first

  Index rows() const { return tokens * group; }
  Index column() const { return heads * head_dim; }
  Index token(Index r) const { return first + r / group; }
  Index head(Index r) const { return heads + r % group; }

  /// How many of n keys query r sees; position: of the tile's first token, counted from the first of these keys.
  Index visible(Index r, Index position, Index n) const { return std::clamp(position + r / group + 1, Index{0}, n); }

  /// (rows, head_dim), contiguous, from (tokens, heads * head_dim).
  template <class A>
  void gather(Matrix<const A> from, A factor, A* to) const {
    for (Index t = 0; t < tokens; ++t)
      for_packs<A>(group * head_dim, [&, at = &from(first + t, column())](Index c, auto n) {
        store(to + t * group * head_dim + c, Pack<A>(factor * load(at + c, n)), n);
      });
  }
};

/// Rows of `cols` elements that lie `stride` apart.
template <class A>
Matrix<A> strided(A* data, Index rows, Index cols, Index stride) {
  Matrix<A> view(data, rows, cols);
  view.stride[0] = stride;
  return view;
}

/// Scratch of the products of `rows` queries with a block of keys or values.
template <class A>
Index attention_product_scratch(Index rows, Index head_dim) {
  constexpr Index keys = AttentionTiling::keys;
  return std::max({product_scratch<A>(rows, head_dim, keys), product_scratch<A>(rows, keys, head_dim),
                   product_scratch<A>(keys, rows, head_dim)});
}

/// (n, head_dim) in the compute type: where it lies, or converted into scratch.
template <class A, class S>
Matrix<const A> in_compute_type(const S* from, Index stride, Index n, Index head_dim, A* scratch) {
  if constexpr (std::is_same_v<A, S>) {
    return strided(from, n, head_dim, stride);
  } else {
    for (Index j = 0; j < n; ++j)
      for_packs<A>(head_dim, [&](Index c, auto count) {
        store(scratch + j * head_dim + c, load_as<A>(from + j * stride + c, count), count);
      });
    return {scratch, n, head_dim};
  }
}

}  // namespace zamba::kernel
