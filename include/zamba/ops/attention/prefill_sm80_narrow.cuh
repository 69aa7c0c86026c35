// SPDX-License-Identifier: MIT
// attention by tensor cores of heads of at most 160 dimensions: see attention_tiles.cuh. Each of four warps holds 32
// queries with all their dimensions in registers, and the probabilities go from one product to the next in registers
// too.
#pragma once

#include <zamba/kernel/mma.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

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
        for (int m = 0; m < row_tiles; ++m) ldmatrix(a[m], own_queries + m * 16 * stride + d);
#pragma unroll
        for (int n = 0; n < key_tiles; n += 2) {
          unsigned b[4];
          ldmatrix(b, k + n * 8 * stride + d);
          const unsigned left[] = {b[0], b[1]}, right[] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            mma_m16n8k16(scores[m][n], a[m], left);
            mma_m16n8k16(scores[m][n + 1], a[m], right);
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
          most = row_max(most);
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
        ldmatrix_transposed(b, v + j * 8 * stride + n * 8);
        const unsigned upper[] = {b[0], b[1]}, lower[] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          const auto& p = probabilities[m];
          mma_m16n8k16(sums[m][n], {p[j][0], p[j][1], p[j + 1][0], p[j + 1][1]}, upper);
          mma_m16n8k16(sums[m][n], {p[j + 2][0], p[j + 2][1], p[j + 3][0], p[j + 3][1]}, lower);
        }
      }
  }
  copy_async_wait<0>();

#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = row_sum(total[m][half]);
      const int r = row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < tile.tokens)
        lse(tile.token + r, tile.head) = greatest[m][half] * static_cast<float>(shape.scale) + ::log(all);
      total[m][half] = 1 / all;
    }
  write_sums(tile, sums, total, row, 0, head_dim, out);
}

}  // namespace zamba::kernel
