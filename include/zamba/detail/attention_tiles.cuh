// SPDX-License-Identifier: MIT
// attention of bf16 on tensor cores, for rows of several tokens; equations and shapes in ops/attention.hpp.
//
// A block takes one head and a tile of a row's queries, which stay in shared memory; keys and values pass by in a ring
// of stages, copied ahead of their use. Two kernels:
//   narrow  heads of at most 160 dimensions. Each of 4 warps holds 32 queries with all their dimensions in registers,
//           and the probabilities go from one product to the next in registers too.
//   deep    wider heads. 8 warps: two groups of rows times four of columns, columns being keys in the first product
//           and dimensions in the second, so that a fragment from shared memory serves 32 or 64 queries. Keys come in
//           slabs of dimensions, values in slabs of keys; probabilities pass through shared memory.
// Rows in shared memory are an odd number of 16-byte pieces apart, so no two of a matrix's 8 rows meet in a bank. What
// lies beyond the head's dimensions or the last key is filled with zeros and never read.
//
// Numeric contract: scores, softmax and sums in float; probabilities, of exponentials relative to the greatest score so
// far, are rounded to bf16 before the second product, their total is not. Keys come in tiles counted from position 0
// and in one order, so a rerun is bit-equal and a row gives the same in any batch. The output is rounded once.
#pragma once

#include <algorithm>
#include <cstdint>

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/detail/launch.cuh>
#include <zamba/detail/tensor_core.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/attention.hpp>

namespace zamba::detail {

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

/// A tile of queries of one row and head, with its keys.
struct QueryTile {
  const bf16 *q, *k, *v;  // of the first query, of key 0
  int token, head;        // the first query's
  int tokens;             // of the tile
  int position;           // of the first query
  int keys;               // that the last query sees
  int row, first_key;     // where key 0 is in the tensors of keys and values: the row there, and the position

  /// Row r has the places from offsets[r] / Queries + r on, which are enough for its tiles whatever the offsets. The
  /// last tiles come first: they see the most keys, and short tasks at the end keep the machine even. Some places are
  /// of no tile: without tokens. Each tile is that of Blocks neighbouring blocks.
  template <int Queries, int Blocks = 1>
  static __device__ QueryTile of_block(const AttentionShape& shape, Matrix<const bf16> queries,
                                       const AttentionKeys<bf16>& source, const Sequences& sequences,
                                       const AttentionRows& rows) {
    QueryTile tile{};
    const unsigned block = (gridDim.x - 1 - blockIdx.x) / Blocks, heads = static_cast<unsigned>(shape.heads);
    const Index place = block / heads;
    tile.head = static_cast<int>(block % heads);
    Index row = 0, high = sequences.rows;
    while (high - row > 1) {
      const Index middle = (row + high) / 2;
      (sequences.offsets[middle] / Queries + middle <= place ? row : high) = middle;
    }
    const Index begin = sequences.begin(row), length = sequences.length(row);
    const Index first = (place - begin / Queries - row) * Queries;
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

/// The place in a 16 x 16 tile, row by row, that this lane names for load_matrices: as a of a product, or as b of two
/// neighbouring ones from a matrix that is stored transposed.
template <int Stride>
__device__ int place_of_a() {
  const int lane = threadIdx.x % 32;
  return lane % 16 * Stride + lane / 16 * 8;
}
template <int Stride>
__device__ int place_of_b() {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * Stride + lane / 8 % 2 * 8;
}

/// The greatest, or the sum, over the four lanes that share a row of c.
__device__ inline float greatest_of_row(float x) {
  x = ::max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return ::max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// Scores (16 RowTiles x 8 ColumnTiles) of keys after the query become -infinity. `query` and `key` are the positions
/// of the first row and column.
template <int RowTiles, int ColumnTiles>
__device__ void mask(float (&scores)[RowTiles][ColumnTiles][4], int query, int key) {
  if (key + 8 * ColumnTiles - 1 <= query) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < RowTiles; ++m)
#pragma unroll
    for (int n = 0; n < ColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (key + 8 * n + lane % 4 * 2 + i % 2 > query + 16 * m + lane / 4 + i / 2 * 8) scores[m][n][i] = -INFINITY;
}

/// sums *= factor, row by row; factor (rows g and g + 8 of every tile). Most often no row has a greater score than
/// before, and nothing is to do.
template <int RowTiles, int ColumnTiles>
__device__ void scale_rows(float (&sums)[RowTiles][ColumnTiles][4], const float (&factor)[RowTiles][2]) {
  bool any = false;
#pragma unroll
  for (int m = 0; m < RowTiles; ++m) any |= factor[m][0] != 1 || factor[m][1] != 1;
  if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll
  for (int m = 0; m < RowTiles; ++m)
#pragma unroll
    for (int n = 0; n < ColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor[m][i / 2];
}

/// Writes rows from `row` on and columns from `column` on of a tile's output.
template <int RowTiles, int ColumnTiles>
__device__ void write_sums(const QueryTile& tile, const float (&sums)[RowTiles][ColumnTiles][4],
                           const float (&factor)[RowTiles][2], int row, int column, int head_dim, Matrix<bf16> out) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < RowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half + lane / 4;
      if (r >= tile.tokens) continue;
      bf16* to = &out(tile.token + r, tile.head * head_dim);
#pragma unroll
      for (int n = 0; n < ColumnTiles; ++n) {
        const int c = column + 8 * n + lane % 4 * 2;
        if (c >= head_dim) continue;
        *reinterpret_cast<unsigned*>(to + c) =
            pack_bf16(sums[m][n][2 * half] * factor[m][half], sums[m][n][2 * half + 1] * factor[m][half]);
      }
    }
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

/// Heads of at most Dims_ dimensions, keys and values in tiles of Keys_.
template <int Dims_, int Keys_>
struct NarrowAttentionTraits {
  static constexpr bool deep = false;
  static constexpr int dims = Dims_, keys = Keys_;
  static_assert(dims % 16 == 0 && keys % 32 == 0);
  static constexpr int warps = 4, threads = 32 * warps, row_tiles = 2;
  static constexpr int queries = warps * 16 * row_tiles;
  static constexpr int stride = dims + 8;
  static constexpr int stages = 4, stage_size = keys * stride;
  static constexpr std::size_t shared_bytes = (queries * stride + stages * stage_size) * sizeof(bf16);
  static constexpr int blocks_at_once = 2;  // of a multiprocessor
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks_at_once)
    narrow_attention_kernel(AttentionShape shape, Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                            AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  constexpr int stride = Traits::stride, row_tiles = Traits::row_tiles;
  constexpr int key_tiles = Traits::keys / 8, dim_tiles = Traits::dims / 8;
  extern __shared__ uint4 tiles[];
  const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
  if (tile.tokens == 0) return;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * row_tiles;
  const float scale = static_cast<float>(shape.scale) * log2_e;
  bf16* queries = reinterpret_cast<bf16*>(tiles);  // (queries, stride)
  StageRing<Traits> ring{queries + Traits::queries * stride};

  const Index k_stride = source.k.stride[1], v_stride = source.v.stride[1];
  int next = 0;         // the first key of the next tile to copy
  bool values = false;  // whether its keys have been
  const auto copy = [&](bf16* to) {
    if (next < tile.keys) {
      const Index from_stride = values ? v_stride : k_stride;
      copy_tile<Traits::threads, Traits::keys, Traits::dims / 8, stride>(
          to, (values ? tile.v : tile.k) + next * from_stride, from_stride, tile.keys - next, head_dim);
      if (values) next += Traits::keys;
      values = !values;
    }
    copy_async_commit();
  };
  copy_tile<Traits::threads, Traits::queries, Traits::dims / 8, stride>(queries, tile.q, q.stride[0], tile.tokens,
                                                                        head_dim);
#pragma unroll 1
  for (int s = 0; s < Traits::stages - 1; ++s) copy(ring.first(s));

  float sums[row_tiles][dim_tiles][4] = {}, greatest[row_tiles][2], total[row_tiles][2] = {};
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) greatest[m][0] = greatest[m][1] = -INFINITY;
  const bf16* own_queries = queries + row * stride + place_of_a<stride>();
  const int last = row < tile.tokens ? tile.position + row + 16 * row_tiles - 1 : -1;  // the position of the last query

  for (int first = 0; first < tile.keys; first += Traits::keys) {
    // A warp that sees none of these keys only keeps pace.
    const bool sees = first <= last;
    const bf16* k = ring.to_read() + place_of_b<stride>();
    copy(ring.to_write());
    unsigned probabilities[row_tiles][key_tiles][2];
    if (sees) {
      float scores[row_tiles][key_tiles][4] = {};
#pragma unroll(Traits::dims > 128 ? 1 : 2)
      for (int d = 0; d < Traits::dims; d += 16) {
        unsigned a[row_tiles][4];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) load_matrices(a[m], own_queries + m * 16 * stride + d);
#pragma unroll
        for (int n = 0; n < key_tiles; n += 2) {
          unsigned b[4];
          load_matrices(b, k + n * 8 * stride + d);
          const unsigned left[] = {b[0], b[1]}, right[] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            mma_16x8x16(scores[m][n], a[m], left);
            mma_16x8x16(scores[m][n + 1], a[m], right);
          }
        }
      }
      mask(scores, tile.position + row, first);
      float shrink[row_tiles][2];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = greatest[m][half];
#pragma unroll
          for (int n = 0; n < key_tiles; ++n)
            most = ::max(most, ::max(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
          most = greatest_of_row(most);
          shrink[m][half] = exp2_approximate((greatest[m][half] - most) * scale);
          greatest[m][half] = most;
          const float origin = -most * scale;
          float of_tile = 0;
#pragma unroll
          for (int n = 0; n < key_tiles; ++n) {
            const float low = exp2_approximate(::fmaf(scores[m][n][2 * half], scale, origin));
            const float high = exp2_approximate(::fmaf(scores[m][n][2 * half + 1], scale, origin));
            of_tile += low + high;
            probabilities[m][n][half] = pack_bf16(low, high);
          }
          total[m][half] = total[m][half] * shrink[m][half] + of_tile;
        }
      scale_rows(sums, shrink);
    }
    const bf16* v = ring.to_read() + lane * stride;
    copy(ring.to_write());
    if (!sees) continue;
#pragma unroll
    for (int j = 0; j < key_tiles; j += 4)  // 32 keys
#pragma unroll
      for (int n = 0; n < dim_tiles; ++n) {
        unsigned b[4];
        if (n % 4 == 0) __syncwarp();  // keeps the compiler from loading more ahead than registers hold
        load_matrices_transposed(b, v + j * 8 * stride + n * 8);
        const unsigned upper[] = {b[0], b[1]}, lower[] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          const auto& p = probabilities[m];
          mma_16x8x16(sums[m][n], {p[j][0], p[j][1], p[j + 1][0], p[j + 1][1]}, upper);
          mma_16x8x16(sums[m][n], {p[j + 2][0], p[j + 2][1], p[j + 3][0], p[j + 3][1]}, lower);
        }
      }
  }
  copy_async_wait<0>();

#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = sum_of_row(total[m][half]);
      const int r = row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < tile.tokens)
        lse(tile.token + r, tile.head) = greatest[m][half] * static_cast<float>(shape.scale) + ::log(all);
      total[m][half] = 1 / all;
    }
  write_sums(tile, sums, total, row, 0, head_dim, out);
}

/// Heads of at most 32 DimTiles_ dimensions in tiles of 32 RowTiles_ queries; slabs of SlabDims_ dimensions of the keys
/// and of SlabKeys_ values.
template <int RowTiles_, int DimTiles_, int SlabDims_, int SlabKeys_, int Stages_>
struct DeepAttentionTraits {
  static constexpr bool deep = true;
  static constexpr int row_tiles = RowTiles_, dim_tiles = DimTiles_, slab_dims = SlabDims_, slab_keys = SlabKeys_;
  static constexpr int row_groups = 2, column_groups = 4, warps = row_groups * column_groups, threads = 32 * warps;
  static constexpr int queries = row_groups * 16 * row_tiles, dims = column_groups * 8 * dim_tiles;
  static constexpr int key_tiles = 4, keys = column_groups * 8 * key_tiles;
  static_assert(slab_dims % 16 == 0 && slab_keys % 32 == 0 && keys % slab_keys == 0);
  static constexpr int stride = dims + 8, k_stride = slab_dims + 8, p_stride = keys + 8;
  static_assert(stride / 8 % 2 == 1 && k_stride / 8 % 2 == 1 && p_stride / 8 % 2 == 1);
  static constexpr int key_slab = keys * k_stride, value_slab = slab_keys * stride;
  static constexpr int stages = Stages_, stage_size = std::max(key_slab, value_slab);
  static constexpr std::size_t shared_bytes =
      (queries * (stride + p_stride) + stages * stage_size) * sizeof(bf16) + queries * column_groups * sizeof(float);
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    deep_attention_kernel(AttentionShape shape, Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                          AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  constexpr int stride = Traits::stride, row_tiles = Traits::row_tiles, dim_tiles = Traits::dim_tiles;
  constexpr int key_tiles = Traits::key_tiles, groups = Traits::column_groups;
  extern __shared__ uint4 tiles[];
  const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
  if (tile.tokens == 0) return;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32 % groups;
  const int row = threadIdx.x / 32 / groups * 16 * row_tiles;
  const float scale = static_cast<float>(shape.scale) * log2_e;
  bf16* queries = reinterpret_cast<bf16*>(tiles);            // (queries, stride)
  bf16* probabilities = queries + Traits::queries * stride;  // (queries, p_stride)
  StageRing<Traits> ring{probabilities + Traits::queries * Traits::p_stride};
  float* of_groups = reinterpret_cast<float*>(ring.stages + Traits::stages * Traits::stage_size);  // (queries, groups)

  const Index k_stride = source.k.stride[1], v_stride = source.v.stride[1];
  const int slabs = (head_dim + Traits::slab_dims - 1) / Traits::slab_dims;  // of keys
  const auto value_slabs = [&](int first) {
    return (::min(Traits::keys, tile.keys - first) + Traits::slab_keys - 1) / Traits::slab_keys;
  };
  int next = 0, slab = 0;  // the first key of the tile and the slab in it that are copied next
  const auto copy = [&](bf16* to) {
    if (next < tile.keys) {
      if (slab < slabs) {
        const int d = slab * Traits::slab_dims;
        copy_tile<Traits::threads, Traits::keys, Traits::slab_dims / 8, Traits::k_stride>(
            to, tile.k + next * k_stride + d, k_stride, tile.keys - next, head_dim - d);
      } else {
        const int j = next + (slab - slabs) * Traits::slab_keys;
        copy_tile<Traits::threads, Traits::slab_keys, Traits::dims / 8, stride>(to, tile.v + j * v_stride, v_stride,
                                                                                tile.keys - j, head_dim);
      }
      if (++slab == slabs + value_slabs(next)) {
        slab = 0;
        next += Traits::keys;
      }
    }
    copy_async_commit();
  };
  copy_tile<Traits::threads, Traits::queries, Traits::dims / 8, stride>(queries, tile.q, q.stride[0], tile.tokens,
                                                                        head_dim);
#pragma unroll 1
  for (int s = 0; s < Traits::stages - 1; ++s) copy(ring.first(s));

  float sums[row_tiles][dim_tiles][4] = {}, greatest[row_tiles][2], total[row_tiles][2] = {};
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) greatest[m][0] = greatest[m][1] = -INFINITY;
  const bf16* own_queries = queries + row * stride + place_of_a<stride>();
  const bf16* own_probabilities = probabilities + row * Traits::p_stride + place_of_a<Traits::p_stride>();

  for (int first = 0; first < tile.keys; first += Traits::keys) {
    const int own_key = first + group * 8 * key_tiles;
    const bool sees = own_key <= tile.position + row + 16 * row_tiles - 1;
    float scores[row_tiles][key_tiles][4] = {};
    for (int s = 0; s < slabs; ++s) {
      const bf16* k = ring.to_read() + group * 8 * key_tiles * Traits::k_stride + place_of_b<Traits::k_stride>();
      copy(ring.to_write());
      if (!sees) continue;
      const bf16* x = own_queries + s * Traits::slab_dims;
      const int dims = ::min(Traits::slab_dims, head_dim - s * Traits::slab_dims);
#pragma unroll(8 / row_tiles / (row_tiles > 2 ? 2 : 1))
      for (int d = 0; d < dims; d += 16) {
        unsigned a[row_tiles][4], b[key_tiles / 2][4];
#pragma unroll
        for (int n = 0; n < key_tiles / 2; ++n) load_matrices(b[n], k + n * 16 * Traits::k_stride + d);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) load_matrices(a[m], x + m * 16 * stride + d);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int n = 0; n < key_tiles / 2; ++n) {
            mma_16x8x16(scores[m][2 * n], a[m], {b[n][0], b[n][1]});
            mma_16x8x16(scores[m][2 * n + 1], a[m], {b[n][2], b[n][3]});
          }
      }
    }

    mask(scores, tile.position + row, own_key);
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < key_tiles; ++n)
          most = ::max(most, ::max(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        most = greatest_of_row(most);
        if (lane % 4 == 0) of_groups[(row + 16 * m + 8 * half + lane / 4) * groups + group] = most;
      }
    __syncthreads();
    float shrink[row_tiles][2];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * m + 8 * half + lane / 4;
        float most = greatest[m][half];
#pragma unroll
        for (int g = 0; g < groups; ++g) most = ::max(most, of_groups[r * groups + g]);
        shrink[m][half] = exp2_approximate((greatest[m][half] - most) * scale);
        greatest[m][half] = most;
        const float origin = -most * scale;
        float of_tile = 0;
        auto* to = reinterpret_cast<unsigned*>(probabilities + r * Traits::p_stride + group * 8 * key_tiles);
#pragma unroll
        for (int n = 0; n < key_tiles; ++n) {
          const float low = exp2_approximate(::fmaf(scores[m][n][2 * half], scale, origin));
          const float high = exp2_approximate(::fmaf(scores[m][n][2 * half + 1], scale, origin));
          of_tile += low + high;
          to[4 * n + lane % 4] = pack_bf16(low, high);
        }
        total[m][half] = total[m][half] * shrink[m][half] + of_tile;
      }
    scale_rows(sums, shrink);

    const int count = value_slabs(first);
    for (int s = 0; s < count; ++s) {
      const bf16* v = ring.to_read() + lane * stride + group * 8 * dim_tiles;
      copy(ring.to_write());
#pragma unroll
      for (int j = 0; j < Traits::slab_keys; j += 32) {
        unsigned p[row_tiles][2][4];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            load_matrices(p[m][half],
                          own_probabilities + m * 16 * Traits::p_stride + s * Traits::slab_keys + j + 16 * half);
#pragma unroll
        for (int n = 0; n < dim_tiles; ++n) {
          unsigned b[4];
          if (row_tiles > 2 && n % 4 == 0) __syncwarp();  // as in the narrow kernel
          load_matrices_transposed(b, v + j * stride + n * 8);
          const unsigned upper[] = {b[0], b[1]}, lower[] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) mma_16x8x16(sums[m][n], p[m][0], upper);
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) mma_16x8x16(sums[m][n], p[m][1], lower);
        }
      }
    }
  }
  copy_async_wait<0>();

  // The totals of the four groups of columns, in order. Their maxima have been read long ago.
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_group = sum_of_row(total[m][half]);
      if (lane % 4 == 0) of_groups[(row + 16 * m + 8 * half + lane / 4) * groups + group] = of_group;
    }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half + lane / 4;
      float all = 0;
#pragma unroll
      for (int g = 0; g < groups; ++g) all += of_groups[r * groups + g];
      if (group == 0 && lane % 4 == 0 && r < tile.tokens)
        lse(tile.token + r, tile.head) = greatest[m][half] * static_cast<float>(shape.scale) + ::log(all);
      total[m][half] = 1 / all;
    }
  write_sums(tile, sums, total, row, group * 8 * dim_tiles, head_dim, out);
}

/// What fits the kernels above, and their launch. A is bf16; templates, so that only what uses the kernels compiles
/// them.
class AttentionTiles {
 public:
  /// Otherwise: the greatest score is not that of the greatest product, rows do not start at multiples of 16 bytes, or
  /// the GPU has too little shared memory.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                  const AttentionKeys<A>& keys, Matrix<A> out) {
    constexpr Index piece = wide<bf16>;
    return shape.scale > 0 && shape.head_dim % piece == 0 && aligned(q, piece) && aligned(keys.k, piece) &&
           aligned(keys.v, piece) && aligned(out, piece) &&
           with_traits(shape.head_dim, []<class Traits>(Traits) { return Traits::shared_bytes; }) <= ctx.most_shared();
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q, const AttentionKeys<A>& keys,
                     const Sequences& sequences, const AttentionRows& rows, Matrix<A> out, Matrix<float> lse) {
    with_traits(shape.head_dim, [&]<class Traits>(Traits) {
      static_assert(Traits::shared_bytes <= 227 * 1024);
      const auto blocks = static_cast<unsigned>((sequences.tokens / Traits::queries + sequences.rows) * shape.heads);
      if constexpr (Traits::deep) {
        allow_shared(deep_attention_kernel<Traits>, Traits::shared_bytes, "attention");
        deep_attention_kernel<Traits><<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(
            shape, q, keys, sequences, rows, out, lse);
      } else {
        allow_shared(narrow_attention_kernel<Traits>, Traits::shared_bytes, "attention");
        narrow_attention_kernel<Traits><<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(
            shape, q, keys, sequences, rows, out, lse);
      }
      check_launch("attention");
    });
  }

 private:
  template <class F>
  static auto with_traits(Index head_dim, F&& f) {
    if (head_dim <= 64) return f(NarrowAttentionTraits<64, 64>{});
    if (head_dim <= 80) return f(NarrowAttentionTraits<80, 64>{});
    if (head_dim <= 128) return f(NarrowAttentionTraits<128, 64>{});
    if (head_dim <= 160) return f(NarrowAttentionTraits<160, 32>{});
    if (head_dim <= 224) return f(DeepAttentionTraits<4, 7, 112, 64, 4>{});
    if (head_dim <= 256) return f(DeepAttentionTraits<4, 8, 128, 64, 3>{});
    if (head_dim <= 480) return f(DeepAttentionTraits<2, 15, 128, 32, 4>{});
    return f(DeepAttentionTraits<2, 16, 128, 32, 4>{});
  }
};

}  // namespace zamba::detail
