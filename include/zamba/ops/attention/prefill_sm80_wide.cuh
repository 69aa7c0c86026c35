// SPDX-License-Identifier: MIT
// attention by tensor cores of heads of more than 160 dimensions: see attention_tiles.cuh. Eight warps are two groups
// of rows times four of columns, columns being keys in the first product and dimensions in the second, so that a
// fragment from shared memory serves 32 or 64 queries. Keys come in slabs of dimensions, values in slabs of keys;
// probabilities pass through shared memory.
#pragma once

#include <algorithm>

#include <zamba/kernel/mma.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

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
  const int slabs = ceil_div(head_dim, Traits::slab_dims);  // of keys
  const auto value_slabs = [&](int first) {
    return ceil_div(::min(Traits::keys, tile.keys - first), Traits::slab_keys);
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
        for (int n = 0; n < key_tiles / 2; ++n) ldmatrix(b[n], k + n * 16 * Traits::k_stride + d);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) ldmatrix(a[m], x + m * 16 * stride + d);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int n = 0; n < key_tiles / 2; ++n) {
            mma_m16n8k16(scores[m][2 * n], a[m], {b[n][0], b[n][1]});
            mma_m16n8k16(scores[m][2 * n + 1], a[m], {b[n][2], b[n][3]});
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
        most = row_max(most);
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
            ldmatrix(p[m][half], own_probabilities + m * 16 * Traits::p_stride + s * Traits::slab_keys + j + 16 * half);
#pragma unroll
        for (int n = 0; n < dim_tiles; ++n) {
          unsigned b[4];
          if (row_tiles > 2 && n % 4 == 0) __syncwarp();  // as in the narrow kernel
          ldmatrix_transposed(b, v + j * stride + n * 8);
          const unsigned upper[] = {b[0], b[1]}, lower[] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) mma_m16n8k16(sums[m][n], p[m][0], upper);
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) mma_m16n8k16(sums[m][n], p[m][1], lower);
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
      const float of_group = row_sum(total[m][half]);
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

}  // namespace zamba::kernel
