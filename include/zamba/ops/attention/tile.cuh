// SPDX-License-Identifier: MIT
// What the kernels of attention share: where a block's queries, keys and values are, and tiles of them in shared
// memory, copied ahead by cp.async.
#pragma once

#include <zamba/kernel/async_copy.cuh>
#include <zamba/kernel/fragment.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/attention.hpp>

namespace zamba::kernel {

/// Keys and values of a row: its own tokens, or a cache.
template <class S_>
struct AttentionKeys {
  using S = S_;
  Tensor<const S, 3> k, v;  // (rows, positions, width), or (1, tokens, width) of all rows
  bool cached;

  /// Where the row's position 0 is; `first` is its first token in the batch.
  __device__ const S* key(Index row, Index first) const { return cached ? &k(row, 0, 0) : &k(0, first, 0); }
  __device__ const S* value(Index row, Index first) const { return cached ? &v(row, 0, 0) : &v(0, first, 0); }
};

/// The rows that a launch is for: those of `shortest` to `longest` tokens.
struct AttentionRows {
  Index shortest, longest;

  __device__ bool have(Index length) const { return length >= shortest && length <= longest; }
};

/// A tile of Size neighbouring tokens of a row: the row, and the tile's first token counted from the row's.
struct TilePlace {
  Index row, first;

  /// Row r has the places from offsets[r] / Size + r on, which are enough for its tiles whatever the offsets. Some
  /// places are of no tile: they begin beyond the row.
  template <int Size>
  static __device__ TilePlace of(const Sequences& sequences, Index place) {
    Index row = 0, high = sequences.rows;
    while (high - row > 1) {
      const Index middle = (row + high) / 2;
      (sequences.offsets[middle] / Size + middle <= place ? row : high) = middle;
    }
    return {row, (place - sequences.begin(row) / Size - row) * Size};
  }
};

/// A tile of queries of one row and head, with its keys.
struct QueryTile {
  const bf16 *q, *k, *v;  // of the first query, of key 0
  int token, head;        // the first query's
  int tokens;             // of the tile
  int position;           // of the first query
  int keys;               // that the last query sees
  int row, first_key;     // where key 0 is in the tensors of keys and values: the row there, and the position

  /// The last tiles come first: they see the most keys, and short tasks at the end keep the machine even. Some blocks
  /// are of no tile: without tokens. Each tile is that of Blocks neighbouring blocks.
  template <int Queries, int Blocks = 1>
  static __device__ QueryTile of_block(const AttentionShape& shape, Matrix<const bf16> queries,
                                       const AttentionKeys<bf16>& source, const Sequences& sequences,
                                       const AttentionRows& rows) {
    QueryTile tile{};
    const unsigned block = (gridDim.x - 1 - blockIdx.x) / Blocks, heads = static_cast<unsigned>(shape.heads);
    tile.head = static_cast<int>(block % heads);
    const auto [row, first] = TilePlace::of<Queries>(sequences, block / heads);
    const Index begin = sequences.begin(row), length = sequences.length(row);
    if (first >= length || !rows.have(length)) return tile;
    const Index column = tile.head / (shape.heads / shape.kv_heads) * shape.head_dim;
    tile.token = static_cast<int>(begin + first);
    tile.tokens = static_cast<int>(::min(Index{Queries}, length - first));
    tile.position = static_cast<int>(first + (source.cached ? sequences.start(row) : 0));
    tile.keys = tile.position + tile.tokens;
    tile.row = source.cached ? static_cast<int>(row) : 0;
    tile.first_key = source.cached ? 0 : static_cast<int>(begin);
    tile.q = &queries(tile.token, tile.head * shape.head_dim);
    tile.k = source.key(row, begin) + column;
    tile.v = source.value(row, begin) + column;
    return tile;
  }

  /// Writes lse of the rows of a fragment whose row 0 is row `first` of the tile. total: the sums of the softmax.
  template <int Rows>
  __device__ void store_lse(const OnlineSoftmax<Rows>& softmax, const RowValues<Rows>& total, int first, float scale,
                            Matrix<float> lse) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int of_tile = first + 8 * r + lane / 4;
      if (lane % 4 == 0 && of_tile < tokens) lse(token + of_tile, head) = softmax.row[r].max * scale + ::log(total[r]);
    }
  }

  /// Writes a fragment whose first element is (row, column) of the tile's output, every row times its factor.
  template <int RowTiles, int ColumnTiles>
  __device__ void store(const Fragment<RowTiles, ColumnTiles>& o, const RowValues<2 * RowTiles>& factor, int row,
                        int column, int head_dim, Matrix<bf16> out) const {
    o.store(&out(token + row, head * head_dim + column), out.stride[0], tokens - row, head_dim - column, factor);
  }
};

/// Begins to copy Rows rows of Pieces times 8 elements; zeros at and after `rows` and `columns`. Not unrolled: the
/// addresses would take the registers that the sums need.
template <int Threads, int Rows, int Pieces, int Stride>
__device__ void copy_tile(bf16* to, const bf16* from, Index stride, int rows, int columns) {
  if constexpr (Threads % Pieces == 0) {
    constexpr int step = Threads / Pieces;
    const int first = threadIdx.x / Pieces, c = threadIdx.x % Pieces * 8;
    to += first * Stride + c;
    from += first * stride + c;
    if (c >= columns) rows = 0;
#pragma unroll 1
    for (int r = first; r < Rows; r += step, to += step * Stride, from += step * stride) copy_async(to, from, r < rows);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < Rows * Pieces; i += Threads) {
      const int r = i / Pieces, c = i % Pieces * 8;
      copy_async(to + r * Stride + c, from + r * stride + c, r < rows && c < columns);
    }
  }
}

/// Where this lane's row of a 16 x 16 tile begins, row by row, for ldmatrix: as a of a product, or as b of two
/// neighbouring ones from a matrix that is stored transposed.
template <int Stride>
__device__ int ldmatrix_offset_of_a() {
  const int lane = threadIdx.x % 32;
  return lane % 16 * Stride + lane / 16 * 8;
}
template <int Stride>
__device__ int ldmatrix_offset_of_b() {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * Stride + lane / 8 % 2 * 8;
}

/// The ring of stages: one group of copies a stage, of which all but one are under way.
template <class Traits>
struct StageRing {
  bf16* stages;
  int at = 0;  // the stage to read next

  /// Before the first read: the stage of this index.
  __device__ bf16* first(int index) const { return stages + index * Traits::stage_size; }
  /// Waits for the next stage. Behind the barrier every warp has left the stage before it.
  __device__ const bf16* to_read() {
    copy_async_wait<Traits::stages - 2>();
    __syncthreads();
    const bf16* stage = stages + at * Traits::stage_size;
    at = at + 1 == Traits::stages ? 0 : at + 1;
    return stage;
  }
  /// The stage that was left.
  __device__ bf16* to_write() const {
    return stages + (at < 2 ? at + Traits::stages - 2 : at - 2) * Traits::stage_size;
  }
};

}  // namespace zamba::kernel
