// SPDX-License-Identifier: MIT
// Prefill of narrow heads, of at most 160 dimensions, by mma.m16n8k16, as FlashAttention-2: see prefill_sm80.cuh. Each
// of four warps holds 32 queries with all their dimensions, and probabilities go from one product to the next in
// registers.
#pragma once

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Heads of at most Dims_ dimensions, keys and values in tiles of Keys_.
template <int Dims_, int Keys_>
struct PrefillSm80NarrowTraits {
  static constexpr bool wide_heads = false;
  static constexpr int dims = Dims_, keys = Keys_;
  static_assert(dims % 16 == 0 && keys % 32 == 0);
  static constexpr int warps = 4, threads = 32 * warps, row_tiles = 2;
  static constexpr int queries = warps * 16 * row_tiles;
  static constexpr int stride = dims + 8;
  static constexpr int stages = 4, stage_size = keys * stride;
  static constexpr std::size_t shared_bytes = (queries * stride + stages * stage_size) * sizeof(bf16);
  static constexpr int blocks_at_once = 2;  // of a multiprocessor

  using Scores = Fragment<row_tiles, keys / 8>;  // S and P
  using Probabilities = OperandFragment<row_tiles, keys / 16>;
  using Sums = Fragment<row_tiles, dims / 8>;  // O
};

/// Copies tiles into stages in the order in which they are read: K, V of the first keys, K, V of the next, ...
template <class Traits>
struct NarrowTileLoader {
  const QueryTile& tile;
  const AttentionKeys<bf16>& source;
  int head_dim;
  int next = 0;         // the first key of the next tile
  bool values = false;  // whether its keys have been

  __device__ __forceinline__ void operator()(bf16* to) {
    if (next < tile.keys) {
      const Index stride = values ? source.v.stride[1] : source.k.stride[1];
      copy_tile<Traits::threads, Traits::keys, Traits::dims / 8, Traits::stride>(
          to, (values ? tile.v : tile.k) + next * stride, stride, tile.keys - next, head_dim);
      if (values) next += Traits::keys;
      values = !values;
    }
    copy_async_commit();
  }
};

/// S = Q K^T. q, k: where this lane's rows of the first tiles begin.
template <class Traits>
__device__ __forceinline__ void multiply_narrow_keys(typename Traits::Scores& s, const bf16* q, const bf16* k) {
  constexpr int row_tiles = Traits::row_tiles, key_tiles = Traits::keys / 8;
#pragma unroll(Traits::dims > 128 ? 1 : 2)
  for (int d = 0; d < Traits::dims; d += 16) {
    unsigned a[row_tiles][4];  // (32 queries x 16 dimensions)
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) ldmatrix(a[m], q + m * 16 * Traits::stride + d);
#pragma unroll
    for (int n = 0; n < key_tiles; n += 2) {
      unsigned b[4];  // (16 dimensions x 16 keys)
      ldmatrix(b, k + n * 8 * Traits::stride + d);
      const unsigned left[] = {b[0], b[1]}, right[] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
        mma_m16n8k16(s.tile(m, n), a[m], left);
        mma_m16n8k16(s.tile(m, n + 1), a[m], right);
      }
    }
  }
}

/// O += P V. v: where this lane's key of the first 32 begins.
template <class Traits>
__device__ __forceinline__ void add_narrow_values(typename Traits::Sums& o, const typename Traits::Probabilities& p,
                                                  const bf16* v) {
#pragma unroll
  for (int k = 0; k < Traits::keys / 16; k += 2)  // 32 keys
#pragma unroll
    for (int n = 0; n < Traits::dims / 8; ++n) {
      unsigned b[4];                 // (32 keys x 8 dimensions)
      if (n % 4 == 0) __syncwarp();  // keeps the compiler from loading more ahead than registers hold
      ldmatrix_transposed(b, v + k * 16 * Traits::stride + n * 8);
      const unsigned upper[] = {b[0], b[1]}, lower[] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < Traits::row_tiles; ++m) {
        mma_m16n8k16(o.tile(m, n), p.tile[m][k], upper);
        mma_m16n8k16(o.tile(m, n), p.tile[m][k + 1], lower);
      }
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks_at_once)
    attention_prefill_sm80_narrow_kernel(AttentionShape shape, Matrix<const bf16> q, AttentionKeys<bf16> source,
                                         Sequences sequences, AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  constexpr int stride = Traits::stride, rows_of_warp = 16 * Traits::row_tiles;
  extern __shared__ uint4 shared[];
  const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
  if (tile.tokens == 0) return;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * rows_of_warp;  // the warp's first query
  const float scale = static_cast<float>(shape.scale) * log2_e;
  bf16* queries = reinterpret_cast<bf16*>(shared);  // (queries, stride)
  StageRing<Traits> ring{queries + Traits::queries * stride};
  NarrowTileLoader<Traits> load{tile, source, head_dim};
  copy_tile<Traits::threads, Traits::queries, Traits::dims / 8, stride>(queries, tile.q, q.stride[0], tile.tokens,
                                                                        head_dim);
#pragma unroll 1
  for (int s = 0; s < Traits::stages - 1; ++s) load(ring.first(s));

  typename Traits::Sums o = {};
  OnlineSoftmax<2 * Traits::row_tiles> softmax;
  const bf16* own_queries = queries + row * stride + ldmatrix_offset_of_a<stride>();
  const int last = row < tile.tokens ? tile.position + row + rows_of_warp - 1 : -1;  // the position of the last query
  for (int first = 0; first < tile.keys; first += Traits::keys) {
    const bool sees = first <= last;  // a warp that sees none of these keys only keeps pace
    const bf16* k = ring.to_read() + ldmatrix_offset_of_b<stride>();
    load(ring.to_write());
    typename Traits::Probabilities p;
    if (sees) {
      typename Traits::Scores s = {};
      multiply_narrow_keys<Traits>(s, own_queries, k);
      if (first + Traits::keys - 1 > tile.position + row) s.mask_after(tile.position + row - first);
      const auto rescale = softmax.update(s, scale);
      p = s.operand();
      o.scale_rows(rescale);
    }
    const bf16* v = ring.to_read() + lane * stride;
    load(ring.to_write());
    if (sees) add_narrow_values<Traits>(o, p, v);
  }
  copy_async_wait<0>();

  const auto total = softmax.total();
  tile.store_lse(softmax, total, row, static_cast<float>(shape.scale), lse);
  tile.store(o, total.reciprocal(), row, 0, head_dim, out);
}

}  // namespace zamba::kernel
