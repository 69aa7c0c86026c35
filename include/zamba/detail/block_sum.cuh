// SPDX-License-Identifier: MIT
// block_sum, block_max: of a value over the threads of a block, known to all of them, in an order that never changes.
#pragma once

#include <zamba/device.hpp>

namespace zamba::detail {

inline constexpr int warp_size = 32;

struct Plus {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return a + b;
  }
};

struct Greater {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return ::max(a, b);
  }
};

/// Threads: the block's, whole warps of them. All must call it; shared memory of `Threads / 32` values is its own.
template <int Threads, class F, class Join>
__device__ F block_reduce(F value, Join join) {
  static_assert(Threads % warp_size == 0 && Threads <= 1024, "zamba: a block is made of whole warps");
  __shared__ F of_warp[Threads / warp_size];
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  __syncthreads();  // the results of an earlier call have been read
  if (threadIdx.x % warp_size == 0) of_warp[threadIdx.x / warp_size] = value;
  __syncthreads();
  F all = of_warp[0];
  for (int warp = 1; warp < Threads / warp_size; ++warp) all = join(all, of_warp[warp]);
  return all;
}

template <int Threads, class F>
__device__ F block_sum(F value) {
  return block_reduce<Threads>(value, Plus{});
}

template <int Threads, class F>
__device__ F block_max(F value) {
  return block_reduce<Threads>(value, Greater{});
}

}  // namespace zamba::detail
