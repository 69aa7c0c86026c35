// SPDX-License-Identifier: MIT
// What the kernels of attention's backward pass share: what they read and write, and the tiles of keys that blocks own.
#pragma once

#include <zamba/kernel/math.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Gradients of keys or values: `own` (tokens, width) of a row's tokens, `cache` (rows, positions, width), optional, of
/// all positions.
template <class A>
struct KeyGradients {
  Matrix<A> own;
  Tensor<compute_t<A>, 3> cache;
};

/// What the pass reads and writes but keys and values; shapes in ops/attention.hpp.
template <class A_>
struct AttentionBackwardTensors {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> d_out, q;
  Tensor<F, 3> sums;  // (2, heads, tokens): lse, then d_out . out
  Matrix<A> d_q;
  KeyGradients<A> d_k, d_v;
};

/// Rows of one head in memory.
template <class T>
struct TileRows {
  const T* first;
  Index stride;
  int count;
};

/// A row of the batch as it attends.
struct AttendingRow {
  Index row, begin;  // begin: its first token, in the batch
  int tokens, past;  // past: positions before its first token

  __device__ AttendingRow(const Sequences& sequences, Index row, bool cached)
      : row(row),
        begin(sequences.begin(row)),
        tokens(static_cast<int>(sequences.length(row))),
        past(cached ? static_cast<int>(sequences.start(row)) : 0) {}
};

/// A tile of at most Size keys of one row and key head, whose gradients a block computes.
template <int Size>
struct KeyTile {
  AttendingRow of;
  int kv_head;
  int first, keys;  // the first key's position; keys of the tile, 0 where there is nothing to do

  /// Blocks for all tiles: with caches, each row has as many as its positions need.
  template <class S>
  static unsigned blocks(const AttentionShape& shape, const AttentionKeys<S>& source, const Sequences& sequences) {
    const Index places = source.cached ? sequences.rows * per_row(source) : sequences.tokens / Size + sequences.rows;
    return static_cast<unsigned>(places * shape.kv_heads);
  }

  /// The first tiles come first: most queries see them. Blocks: how many neighbouring ones share a tile.
  template <int Blocks = 1, class S>
  static __device__ KeyTile of_block(const AttentionShape& shape, const AttentionKeys<S>& source,
                                     const Sequences& sequences, bool past_too) {
    const unsigned block = blockIdx.x / Blocks, kv_heads = static_cast<unsigned>(shape.kv_heads);
    const Index place = block / kv_heads;
    TilePlace at;
    if (source.cached)
      at = {place / per_row(source), place % per_row(source) * Size};
    else
      at = TilePlace::of<Size>(sequences, place);
    KeyTile tile{{sequences, at.row, source.cached}, static_cast<int>(block % kv_heads), static_cast<int>(at.first), 0};
    const int end = tile.of.past + tile.of.tokens;
    const bool wanted = tile.of.tokens > 0 && (past_too || at.first + Size > tile.of.past);
    if (wanted && at.first < end) tile.keys = ::min(Size, end - tile.first);
    return tile;
  }

  /// The first of the row's tokens that sees any of these keys.
  __device__ int first_query() const { return ::max(0, first - of.past); }

  /// Gradient of the key `j` of the tile in column c: that of an own token begins with what the cache has of it, which
  /// becomes zero; what lies before goes to the cache.
  template <class A>
  __device__ __forceinline__ void put(const KeyGradients<A>& to, int j, Index c, compute_t<A> gradient) const {
    const int position = first + j;
    auto* const in_cache = to.cache ? &to.cache(of.row, position, c) : nullptr;
    if (position < of.past) {
      if (in_cache) *in_cache += gradient;
      return;
    }
    if (in_cache) {
      gradient += *in_cache;
      *in_cache = 0;
    }
    to.own(of.begin + position - of.past, c) = A(gradient);
  }

  /// The same of all of a lane, times `factor`: its first row is the tile's `row`, and column 0 of the fragment the
  /// head's `column`. Two elements at a time.
  template <class Sums>
  __device__ __forceinline__ void put(const KeyGradients<bf16>& to, const Sums& sums, int row, int column,
                                      Index head_dim, float factor) const {
    column += Sums::first_column();
#pragma unroll
    for (int r = 0; r < Sums::rows; ++r) {
      const int j = row + 8 * r, position = first + j;
      if (j >= keys) continue;
      const bool past = position < of.past;
      bf16* const own = past ? nullptr : &to.own(of.begin + position - of.past, kv_head * head_dim);
      float* const in_cache = to.cache ? &to.cache(of.row, position, kv_head * head_dim) : nullptr;
#pragma unroll
      for (int c = 0; c < Sums::columns; c += 2) {
        const int d = column + 4 * c;
        if (d >= head_dim) continue;
        float pair[] = {factor * sums.at(r, c), factor * sums.at(r, c + 1)};
        if (in_cache)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            pair[i] += in_cache[d + i];
            in_cache[d + i] = past ? pair[i] : 0;
          }
        if (own) *reinterpret_cast<unsigned*>(own + d) = pack_bf16(pair[0], pair[1]);
      }
    }
  }

 private:
  template <class S>
  static ZAMBA_HOST_DEVICE Index per_row(const AttentionKeys<S>& source) {
    return ceil_div(source.k.shape[1], Index{Size});
  }
};

}  // namespace zamba::kernel
