// SPDX-License-Identifier: MIT
// What the warpgroup kernels of attention share: see prefill_sm90.cuh; rows and lanes as in sm90.cuh and fragment.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Queries, keys and values, as boxes of the sizes that a kernel loads.
struct AttentionTensorMaps {
  CUtensorMap q, k, v;
};

/// Barriers of a ring of stages between producer and consumers: a stage is full, it was read.
template <int Stages>
struct PipelineBarriers {
  Mbarrier full[Stages], empty[Stages];

  __device__ void init(unsigned producers, unsigned consumers) {
    for (int s = 0; s < Stages; ++s) {
      full[s].init(producers);
      empty[s].init(consumers);
    }
  }
};

/// A walk through a ring of stages. A consumer waits for full[stage] with its phase; a producer for empty[stage] with
/// the phase before, so that the first time round it does not wait.
template <int Stages>
struct PipelineState {
  int stage = 0;
  unsigned phase = 0;

  __device__ void advance() {
    if (++stage < Stages) return;
    stage = 0;
    ++phase;
  }
};

/// S (64 x Keys) = Q K^T, or += with `add`, over 16 Steps dimensions of them. Their atoms of 64 dimensions lie QAtom
/// and KAtom bytes apart.
template <int Steps, int QAtom, int KAtom, int KeyTiles>
__device__ __forceinline__ void multiply_keys(Fragment<1, KeyTiles>& s, std::uint64_t q, std::uint64_t k, bool add) {
#pragma unroll
  for (int d = 0; d < Steps; ++d)
    Wgmma<8 * KeyTiles>::ss(s.sums, q + descriptor_step(d / 4 * QAtom + d % 4 * 32),
                            k + descriptor_step(d / 4 * KAtom + d % 4 * 32), add || d > 0);
}

/// O (64 x 8 Tiles) += P V over 16 keys, by as few products as there are sizes for, the first at column First. p (64 x
/// 16); v (16 x 8 Tiles), whose atoms of 64 dimensions lie Atom bytes apart.
template <int Atom, int First = 0, int Tiles>
__device__ __forceinline__ void add_values(Fragment<1, Tiles>& o, const unsigned (&p)[4], std::uint64_t v) {
  if constexpr (constexpr int left = 8 * Tiles - First; left > 0) {
    constexpr int size = left >= 128   ? 128
                         : left == 112 ? 112
                         : left >= 96  ? 96
                         : left >= 64  ? 64
                         : left >= 32  ? 32
                                       : 16;
    static_assert(First % atom_columns == 0);
    Wgmma<size>::rs(o.sums + First / 2, p, v + descriptor_step(First / atom_columns * Atom));
    add_values<Atom, First + size>(o, p, v);
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

/// Where the first atom of a block's shared memory begins.
__device__ inline std::byte* at_atom_alignment(void* shared) {
  const unsigned past = shared_address(shared) % atom_alignment;
  return static_cast<std::byte*>(shared) + (past ? atom_alignment - past : 0);
}

}  // namespace zamba::kernel
