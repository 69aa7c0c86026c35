// SPDX-License-Identifier: MIT
// What comes before ssd_products_kernel() where its blocks take segments of rows: the states before these.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/chunk_scan.cuh>

namespace zamba::kernel {

/// Before ssd_products_kernel() by segments: the state before a row; and what each segment but the last makes of 0, to
/// where the state before the next one belongs.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    ssd_segments_kernel(SsdInputs<bf16, float> in, Sequences sequences, Tensor<float, 3> state, SsdSegments segments,
                        Index few_tokens) {
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdPart<Traits> part(in, sequences, segments.count - 1);
  if (part.of_row <= few_tokens) return;
  SsdStateWarp<Traits> own;
  if (part.segment == 0)
    own.begin_row(part, sequences.start(part.row) > 0 ? state : Tensor<float, 3>{}, &segments.states(part.index, 0, 0));
  constexpr int chunks = Traits::segment;
  if (part.of_row <= (part.segment + 1) * Index{chunks * Traits::Q}) return;
  SsdCarrier<Traits> carrier(in, part, shared);
  SsdClock<Traits> clock(in, part, shared);
  const bool keeps_time = threadIdx.x < 32;
  const auto keep_time = [&](int chunk) {  // and ask for the next one
    if (!keeps_time) return;
    clock.keep(chunk);
    clock.ask(chunk + 1);
  };
  if (keeps_time) clock.ask(0);
  carrier.begin();
  keep_time(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    carrier.wait_for(chunk);
    own.advance(shared, chunk);
    keep_time(chunk + 1);
  }
#pragma unroll
  for (int j = 0; j < own.pieces; ++j)
    own.piece(&segments.states(part.index, part.segment + 1, 0), j) =
        make_float4(own.s[j][0], own.s[j][1], own.s[j][2], own.s[j][3]);
  if (threadIdx.x == 0) segments.decays(part.index, part.segment + 1) = own.decay;
}

/// Between those two: the states before the segments, in order, four elements a thread.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_carry_kernel(Sequences sequences, SsdSegments segments, Index parts_of_row, Index few_tokens) {
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
  float4 carried = at(0);
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
        carried = make_float4(::fmaf(left, carried.x, own[i].x), ::fmaf(left, carried.y, own[i].y),
                              ::fmaf(left, carried.z, own[i].z), ::fmaf(left, carried.w, own[i].w));
        at(first + i) = carried;
      }
  }
}

}  // namespace zamba::kernel
