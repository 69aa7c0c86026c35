// SPDX-License-Identifier: MIT
// advance_rows on CUDA: stream compaction by a prefix sum. One block finds which rows go on, some at a time, and moves
// their tokens together; contract in generate/device_loop.hpp.
#pragma once

#include <zamba/context.cuh>
#include <zamba/generate/generator.hpp>
#include <zamba/kernel/block_scan.cuh>
#include <zamba/kernel/launch.cuh>

namespace zamba {

namespace kernel {

struct AdvanceTraits {
  static constexpr int threads = 128;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads) advance_rows_kernel(GenerationRows rows) {
  launch_dependents();
  grid_dependency_wait();
  Index running = 0;  // of the rows so far
  for (Index first = 0; first < rows.rows; first += Traits::threads) {
    const Index row = first + threadIdx.x;
    Token token = 0;
    Index runs = 0, of_these;
    if (row < rows.rows) {
      rows.starts[row] += rows.offsets[row + 1] - rows.offsets[row];
      const Index left = rows.left[row];
      const Drawn drawn = rows.drawn[row];
      token = drawn.token;
      if (left > 1 && drawn.outcome == Drawn::drawn && !(rows.stops[token / 32] >> token % 32 & 1)) {
        runs = 1;
        rows.seen(row, token / 32) |= std::uint32_t{1} << token % 32;
      }
      rows.left[row] = runs ? left - 1 : 0;
    }
    // It waits for all threads, so the offsets of these rows have been read.
    const Index at = running + block_exclusive_sum<Traits::threads>(runs, of_these);
    if (row < rows.rows) rows.offsets[row] = at;
    if (runs) rows.tokens[at] = token;
    running += of_these;
  }
  if (threadIdx.x != 0) return;
  rows.offsets[rows.rows] = running;
  rows.turn[0] ^= 1;
}

}  // namespace kernel

template <>
struct AdvanceRows<cuda> {
  static void advance(Context<cuda>& ctx, const GenerationRows& rows) {
    using Traits = kernel::AdvanceTraits;
    kernel::launch(ctx, "advance_rows", kernel::advance_rows_kernel<Traits>, 1, Traits::threads, 0, rows);
  }
};

}  // namespace zamba
