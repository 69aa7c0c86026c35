// SPDX-License-Identifier: MIT
// block_exclusive_sum: the prefix sum of integers over the threads of a block, as Hillis and Steele: within warps by
// shuffles over doubling distances, then over the warps' totals. (CUB has one too, but with it comes a namespace
// `cuda`, which a user's `using namespace zamba` would then confuse with the device.)
#pragma once

#include <zamba/kernel/block_reduce.cuh>

namespace zamba::kernel {

/// The sum over the threads before this one; `total` becomes that over all. All threads call it.
template <int Threads, class T>
__device__ T block_exclusive_sum(T value, T& total) {
  constexpr int warps = Threads / warp_size;
  static_assert(Threads % warp_size == 0 && warps <= warp_size, "zamba: a block is made of whole warps");
  __shared__ T of_warps[warps];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < warp_size; distance *= 2) {
    const T of_lower = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += of_lower;
  }
  __syncthreads();  // the results of an earlier call have been read
  if (lane == warp_size - 1) of_warps[warp] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before = total;
    total += of_warps[w];
  }
  return before + inclusive - value;
}

}  // namespace zamba::kernel
