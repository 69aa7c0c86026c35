// SPDX-License-Identifier: MIT
// What the kernels of attention by warpgroups share: see attention_warpgroups.cuh. Rows and lanes as in warpgroup.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Queries, keys and values, as boxes of the sizes that a kernel copies.
struct AttentionBoxes {
  CUtensorMap q, k, v;
};

/// Barriers of a ring of stages.
template <int Stages>
struct StageBarriers {
  Mbarrier full[Stages], empty[Stages];

  __device__ void init(unsigned readers) {
    for (int s = 0; s < Stages; ++s) {
      full[s].init(1);
      empty[s].init(readers);
    }
  }
};

/// A walk through a ring of stages.
template <int Stages>
struct StageWalk {
  int stage = 0;
  unsigned phase = 0;

  __device__ void next() {
    if (++stage < Stages) return;
    stage = 0;
    ++phase;
  }
};

/// The running softmax of two rows of a warpgroup's sums, r = g and g + 8, in the four lanes that share them.
struct RowSoftmax {
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {};  // total: of this lane

  /// Scores (Count a lane) become exponentials; shrink: the factor of what was summed before.
  template <int Count>
  __device__ __forceinline__ void add(float (&scores)[Count], float scale, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = greatest[half];
#pragma unroll
      for (int i = 2 * half; i < Count; i += 4) most = ::max(most, ::max(scores[i], scores[i + 1]));
      most = row_max(most);
      shrink[half] = exp2_approximate((greatest[half] - most) * scale);
      greatest[half] = most;
      const float origin = -most * scale;
      float of_tile = 0;
#pragma unroll
      for (int i = 2 * half; i < Count; i += 4) {
        scores[i] = exp2_approximate(::fmaf(scores[i], scale, origin));
        scores[i + 1] = exp2_approximate(::fmaf(scores[i + 1], scale, origin));
        of_tile += scores[i] + scores[i + 1];
      }
      total[half] = total[half] * shrink[half] + of_tile;
    }
  }
};

/// Scores of keys after the query become -infinity. `query` is the position of row g, `key` that of the first column.
template <int Count>
__device__ __forceinline__ void mask_scores(float (&scores)[Count], int query, int key) {
  const int reach = query - key - threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < Count; ++i)
    if (i / 4 * 8 + i % 2 > reach + i / 2 % 2 * 8) scores[i] = -INFINITY;
}

/// sums *= factor, row by row; most often there is nothing to do.
template <int Count>
__device__ __forceinline__ void scale_sums(float (&sums)[Count], const float (&factor)[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
  for (int i = 0; i < Count; ++i) sums[i] *= factor[i / 2 % 2];
}

/// scores = a b^T over Steps times 16 columns, whose atoms lie AAtom and BAtom bytes apart; `add`: to what is there.
template <int Keys, int Steps, int AAtom, int BAtom>
__device__ __forceinline__ void multiply_keys(float (&scores)[Keys / 2], std::uint64_t a, std::uint64_t b, bool add) {
#pragma unroll
  for (int k = 0; k < Steps; ++k)
    Wgmma<Keys>::of_shared(scores, a + descriptor_step(k / 4 * AAtom + k % 4 * 32),
                           b + descriptor_step(k / 4 * BAtom + k % 4 * 32), add || k > 0);
}

/// sums (64 x Columns) += p times 16 rows of values, whose atoms lie Atom bytes apart, by as few products as there are
/// sizes for.
template <int Columns, int Atom, int First = 0>
__device__ __forceinline__ void add_values(float (&sums)[Columns / 2], const unsigned (&p)[4], std::uint64_t v) {
  if constexpr (constexpr int left = Columns - First; left > 0) {
    constexpr int size = left >= 128 ? 128 : left >= 96 ? 96 : left >= 64 ? 64 : left >= 32 ? 32 : 16;
    static_assert(First % atom_columns == 0);
    Wgmma<size>::add(sums + First / 2, p, v + descriptor_step(First / atom_columns * Atom));
    add_values<Columns, Atom, First + size>(sums, p, v);
  }
}

/// Rows from `first` on of atoms become zero, before the products of this warpgroup read them. Another warpgroup that
/// reads the same atoms clears them itself: what it then reads is zero, whoever wrote it last.
template <int Atoms>
__device__ void clear_rows(std::byte* atoms, int atom_bytes, int first, int rows) {
  first = ::max(first, 0);
  for (int i = first * 8 + threadIdx.x % warpgroup_threads; i < rows * 8; i += warpgroup_threads)
    for (int n = 0; n < Atoms; ++n) *reinterpret_cast<uint4*>(atoms + n * atom_bytes + i * 16) = uint4{};
  fence_proxy_async();
  named_barrier_sync(1 + threadIdx.x / warpgroup_threads, warpgroup_threads);
}

/// Writes two rows of sums, times factor: row `row` of the tile and the one 8 on, from `column` on.
template <int Count>
__device__ void write_rows(const QueryTile& tile, const float (&sums)[Count], const float (&factor)[2], int row,
                           int column, int head_dim, Matrix<bf16> out) {
  column += threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    if (r >= tile.tokens) continue;
    bf16* to = &out(tile.token + r, tile.head * head_dim);
#pragma unroll
    for (int n = 0; n < Count / 4; ++n)
      if (const int c = column + 8 * n; c < head_dim)
        *reinterpret_cast<unsigned*>(to + c) =
            pack_bf16(sums[4 * n + 2 * half] * factor[half], sums[4 * n + 2 * half + 1] * factor[half]);
  }
}

/// Where the first atom of a block's shared memory begins.
__device__ inline std::byte* at_atom_alignment(void* shared) {
  const unsigned past = shared_address(shared) % atom_alignment;
  return static_cast<std::byte*>(shared) + (past ? atom_alignment - past : 0);
}

}  // namespace zamba::kernel
