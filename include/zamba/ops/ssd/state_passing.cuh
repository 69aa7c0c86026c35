// SPDX-License-Identifier: MIT
// State passing between the segments of ssd's rows, before the chunk scan, where that takes segments of rows side by
// side: one kernel makes of 0 what each segment's own tokens make of it, another goes through these in order and
// leaves in their places the states before the segments. The same arithmetic, bit by bit, as of one block that goes
// through the whole row.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/chunk_state.cuh>

namespace zamba::kernel {

/// What the kernels below hand to the chunk scan. Nothing where its blocks take whole rows.
struct SsdSegments {
  Tensor<float, 3> states;  // (parts of all rows, count, P N) the state before each segment, as threads have them
  Matrix<float> decays;     // (parts of all rows, count) the logarithm of the decay in the segment before
  int count = 1;            // blocks for a part of a row
};

/// The state before a row; and what each segment but the last makes of 0, to where the state before the next one
/// belongs. All warps are both producers and consumers; the first also computes the decays.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    ssd_segment_state_kernel(SsdInputs<bf16, float> in, Sequences sequences, Tensor<float, 3> state,
                             SsdSegments segments, Index few_tokens) {
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdPart<Traits> part(in, sequences, segments.count - 1);
  if (part.of_row <= few_tokens) return;
  SsdState<Traits> own;
  if (part.segment == 0)
    own.begin_row(part, sequences.start(part.row) > 0 ? state : Tensor<float, 3>{}, &segments.states(part.index, 0, 0));
  constexpr int chunks = Traits::segment;
  if (part.of_row <= (part.segment + 1) * Index{chunks * Traits::Q}) return;
  SsdLoader<Traits> loader(in, part, shared);
  SsdDecay<Traits> decay(in, part, shared);
  const bool decays = threadIdx.x < 32;
  const auto store_decay = [&](int chunk) {  // and read what that of the next one is made of
    if (!decays) return;
    decay.store(chunk);
    decay.load(chunk + 1);
  };
  if (decays) decay.load(0);
  loader.begin();
  store_decay(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    loader.wait_for(chunk);
    own.advance(shared, chunk);
    store_decay(chunk + 1);
  }
#pragma unroll
  for (int j = 0; j < own.pieces; ++j)
    own.piece(&segments.states(part.index, part.segment + 1, 0), j) =
        make_float4(own.s[j][0], own.s[j][1], own.s[j][2], own.s[j][3]);
  if (threadIdx.x == 0) segments.decays(part.index, part.segment + 1) = own.decay;
}

/// The states before the segments, in order: S = s + 2^decay S. A thread takes four elements of a state.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_state_passing_kernel(Sequences sequences, SsdSegments segments, Index parts_of_row, Index few_tokens) {
  launch_dependents();
  grid_dependency_wait();
  constexpr int across = Traits::N * Traits::P / 4 / Traits::threads;  // blocks of a part
  const Index part = blockIdx.x / across, length = sequences.length(part / parts_of_row);
  if (length <= few_tokens) return;
  constexpr Index tokens = Traits::segment * Traits::Q;
  const int count = static_cast<int>(ceil_div(length, tokens));
  const int element = 4 * static_cast<int>(blockIdx.x % across * Traits::threads + threadIdx.x);
  const auto at = [&](int segment) -> float4& {
    return *reinterpret_cast<float4*>(&segments.states(part, segment, element));
  };
  float4 passed = at(0);
  constexpr int ahead = 4;  // segments read at once
  for (int first = 1; first < count; first += ahead) {
    float4 own[ahead];
    float decay[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (first + i < count) own[i] = at(first + i), decay[i] = segments.decays(part, first + i);
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (first + i < count) {
        const float left = exp2_approximate(decay[i]);
        passed = make_float4(::fmaf(left, passed.x, own[i].x), ::fmaf(left, passed.y, own[i].y),
                             ::fmaf(left, passed.z, own[i].z), ::fmaf(left, passed.w, own[i].w));
        at(first + i) = passed;
      }
  }
}

}  // namespace zamba::kernel
