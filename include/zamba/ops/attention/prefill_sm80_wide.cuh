// SPDX-License-Identifier: MIT
// Prefill of wide heads, of more than 160 dimensions, by mma.m16n8k16, as FlashAttention-2: see prefill_sm80.cuh. Eight
// warps are two groups of rows times four of columns, columns being keys in the first product and dimensions in the
// second, so that a fragment from shared memory serves 32 or 64 queries. Keys come in slabs of dimensions, values in
// slabs of keys; the row maxima and the probabilities of the four groups meet in shared memory.
#pragma once

#include <algorithm>

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Heads of at most 32 DimTiles_ dimensions in tiles of 32 RowTiles_ queries; slabs of SlabDims_ dimensions of the keys
/// and of SlabKeys_ values.
template <int RowTiles_, int DimTiles_, int SlabDims_, int SlabKeys_, int Stages_>
struct PrefillSm80WideTraits {
  static constexpr bool wide_heads = true;
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

  using Scores = Fragment<row_tiles, key_tiles>;  // S and P: 32 keys of a warp
  using Sums = Fragment<row_tiles, dim_tiles>;    // O: a quarter of the dimensions
  using Rows = RowValues<2 * row_tiles>;
};

/// The slabs of a tile, and their copies into stages in the order in which they are read: for every tile of keys the
/// slabs of its keys, then those of its values.
template <class Traits>
struct WideSlabLoader {
  const QueryTile& tile;
  const AttentionKeys<bf16>& source;
  int head_dim, key_slabs;
  int next = 0, slab = 0;  // the first key of the tile and the slab in it that are copied next

  __device__ __forceinline__ int value_slabs(int first) const {
    return ceil_div(::min(Traits::keys, tile.keys - first), Traits::slab_keys);
  }
  __device__ __forceinline__ void operator()(bf16* to) {
    if (next < tile.keys) {
      const Index k_stride = source.k.stride[1], v_stride = source.v.stride[1];
      if (slab < key_slabs) {
        const int d = slab * Traits::slab_dims;
        copy_tile<Traits::threads, Traits::keys, Traits::slab_dims / 8, Traits::k_stride>(
            to, tile.k + next * k_stride + d, k_stride, tile.keys - next, head_dim - d);
      } else {
        const int j = next + (slab - key_slabs) * Traits::slab_keys;
        copy_tile<Traits::threads, Traits::slab_keys, Traits::dims / 8, Traits::stride>(
            to, tile.v + j * v_stride, v_stride, tile.keys - j, head_dim);
      }
      if (++slab == key_slabs + value_slabs(next)) {
        slab = 0;
        next += Traits::keys;
      }
    }
    copy_async_commit();
  }
};

/// S += Q K^T over `dims` dimensions of a slab. q, k: where this lane's rows of the first tiles begin.
template <class Traits>
__device__ __forceinline__ void multiply_key_slab(typename Traits::Scores& s, const bf16* q, const bf16* k, int dims) {
  constexpr int row_tiles = Traits::row_tiles, key_tiles = Traits::key_tiles;
#pragma unroll(8 / row_tiles / (row_tiles > 2 ? 2 : 1))
  for (int d = 0; d < dims; d += 16) {
    unsigned a[row_tiles][4];      // (16 row_tiles queries x 16 dimensions)
    unsigned b[key_tiles / 2][4];  // (16 dimensions x 32 keys)
#pragma unroll
    for (int n = 0; n < key_tiles / 2; ++n) ldmatrix(b[n], k + n * 16 * Traits::k_stride + d);
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) ldmatrix(a[m], q + m * 16 * Traits::stride + d);
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int n = 0; n < key_tiles / 2; ++n) {
        mma_m16n8k16(s.tile(m, 2 * n), a[m], {b[n][0], b[n][1]});
        mma_m16n8k16(s.tile(m, 2 * n + 1), a[m], {b[n][2], b[n][3]});
      }
  }
}

/// O += P V over a slab of keys. p: where this lane's row of the slab's probabilities begins; v: its first key.
template <class Traits>
__device__ __forceinline__ void add_value_slab(typename Traits::Sums& o, const bf16* probabilities, const bf16* v) {
  constexpr int row_tiles = Traits::row_tiles;
#pragma unroll
  for (int j = 0; j < Traits::slab_keys; j += 32) {
    unsigned p[row_tiles][2][4];  // (16 row_tiles queries x 32 keys)
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ldmatrix(p[m][half], probabilities + m * 16 * Traits::p_stride + j + 16 * half);
#pragma unroll
    for (int n = 0; n < Traits::dim_tiles; ++n) {
      unsigned b[4];                                  // (32 keys x 8 dimensions)
      if (row_tiles > 2 && n % 4 == 0) __syncwarp();  // as for narrow heads
      ldmatrix_transposed(b, v + j * Traits::stride + n * 8);
      const unsigned upper[] = {b[0], b[1]}, lower[] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) mma_m16n8k16(o.tile(m, n), p[m][0], upper);
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) mma_m16n8k16(o.tile(m, n), p[m][1], lower);
    }
  }
}

/// A number of every row from each of the four warps that share the row.
template <class Traits>
struct ColumnGroups {
  static constexpr int groups = Traits::column_groups;
  using Rows = typename Traits::Rows;
  float* values;  // (queries, groups)

  /// This warp's numbers, of rows from `row` on; all lanes of a quad have the same.
  __device__ __forceinline__ void publish(const Rows& own, int row, int group) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2 * Traits::row_tiles; ++r)
      if (lane % 4 == 0) values[(row + 8 * r + lane / 4) * groups + group] = own[r];
    __syncthreads();
  }
  /// fold(of all groups so far, of the next), in their order.
  template <class Fold>
  __device__ __forceinline__ Rows fold(Rows all, int row, Fold&& fold) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2 * Traits::row_tiles; ++r)
#pragma unroll
      for (int g = 0; g < groups; ++g) all[r] = fold(all[r], values[(row + 8 * r + lane / 4) * groups + g]);
    return all;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_prefill_sm80_wide_kernel(AttentionShape shape, Matrix<const bf16> q, AttentionKeys<bf16> source,
                                       Sequences sequences, AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  constexpr int stride = Traits::stride, p_stride = Traits::p_stride, keys_of_warp = 8 * Traits::key_tiles;
  extern __shared__ uint4 shared[];
  const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
  if (tile.tokens == 0) return;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32 % Traits::column_groups;
  const int row = threadIdx.x / 32 / Traits::column_groups * 16 * Traits::row_tiles;  // the warp's first query
  const float scale = static_cast<float>(shape.scale) * log2_e;
  bf16* queries = reinterpret_cast<bf16*>(shared);           // (queries, stride)
  bf16* probabilities = queries + Traits::queries * stride;  // (queries, p_stride)
  StageRing<Traits> ring{probabilities + Traits::queries * p_stride};
  const ColumnGroups<Traits> groups{reinterpret_cast<float*>(ring.stages + Traits::stages * Traits::stage_size)};
  WideSlabLoader<Traits> load{tile, source, head_dim, ceil_div(head_dim, Traits::slab_dims)};
  copy_tile<Traits::threads, Traits::queries, Traits::dims / 8, stride>(queries, tile.q, q.stride[0], tile.tokens,
                                                                        head_dim);
#pragma unroll 1
  for (int s = 0; s < Traits::stages - 1; ++s) load(ring.first(s));

  typename Traits::Sums o = {};
  OnlineSoftmax<2 * Traits::row_tiles> softmax;
  const bf16* own_queries = queries + row * stride + ldmatrix_offset_of_a<stride>();
  const bf16* own_probabilities = probabilities + row * p_stride + ldmatrix_offset_of_a<p_stride>();
  for (int first = 0; first < tile.keys; first += Traits::keys) {
    const int own_key = first + group * keys_of_warp;
    const bool sees = own_key <= tile.position + row + 16 * Traits::row_tiles - 1;
    typename Traits::Scores s = {};
    for (int slab = 0; slab < load.key_slabs; ++slab) {
      const bf16* k =
          ring.to_read() + group * keys_of_warp * Traits::k_stride + ldmatrix_offset_of_b<Traits::k_stride>();
      load(ring.to_write());
      if (!sees) continue;
      const int d = slab * Traits::slab_dims;
      multiply_key_slab<Traits>(s, own_queries + d, k, ::min(Traits::slab_dims, head_dim - d));
    }
    if (own_key + keys_of_warp - 1 > tile.position + row) s.mask_after(tile.position + row - own_key);
    groups.publish(s.row_max(Traits::Rows::filled(-INFINITY)), row, group);
    const auto max = groups.fold(softmax.max(), row, [](float x, float y) { return ::max(x, y); });
    const auto rescale = softmax.update(s, max, scale);
    s.store(probabilities + row * p_stride + group * keys_of_warp, p_stride);
    o.scale_rows(rescale);
    const int slabs = load.value_slabs(first);
    for (int slab = 0; slab < slabs; ++slab) {
      const bf16* v = ring.to_read() + lane * stride + group * 8 * Traits::dim_tiles;
      load(ring.to_write());
      add_value_slab<Traits>(o, own_probabilities + slab * Traits::slab_keys, v);
    }
  }
  copy_async_wait<0>();

  groups.publish(softmax.total(), row, group);  // the maxima have been read long ago
  const auto total = groups.fold(Traits::Rows::filled(0), row, [](float x, float y) { return x + y; });
  if (group == 0) tile.store_lse(softmax, total, row, static_cast<float>(shape.scale), lse);
  tile.store(o, total.reciprocal(), row, group * 8 * Traits::dim_tiles, head_dim, out);
}

}  // namespace zamba::kernel
