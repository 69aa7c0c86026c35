// SPDX-License-Identifier: MIT
// block_sum, block_min, block_max: a reduction over the threads of a block, known to all of them. A butterfly of warp
// shuffles, then the warps' results in order through shared memory: the order of a sum never changes, so a rerun is
// bit-equal.
#pragma once

#include <zamba/device.hpp>

namespace zamba::kernel {

inline constexpr int warp_size = 32;

struct Plus {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return a + b;
  }
};

struct Maximum {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return ::max(a, b);
  }
};

struct Minimum {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return ::min(a, b);
  }
};

/// Threads: the block's, whole warps of them. All must call it. Its shared memory is double-buffered: a kernel whose
/// calls have turns 0, 1, 0, ... meets one barrier in each.
template <int Threads, class F, class Op>
__device__ F block_reduce_in_turn(F value, Op op, int turn) {
  static_assert(Threads % warp_size == 0 && Threads <= 1024, "zamba: a block is made of whole warps");
  __shared__ F of_warp[2][Threads / warp_size];
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, distance));
  if (threadIdx.x % warp_size == 0) of_warp[turn][threadIdx.x / warp_size] = value;
  __syncthreads();  // also, the results of the call before the last have been read
  F all = of_warp[turn][0];
#pragma unroll
  for (int warp = 1; warp < Threads / warp_size; ++warp) all = op(all, of_warp[turn][warp]);
  return all;
}

/// The same in calls of any order, at the cost of a second barrier.
template <int Threads, class F, class Op>
__device__ F block_reduce(F value, Op op) {
  __syncthreads();  // the results of an earlier call have been read
  return block_reduce_in_turn<Threads>(value, op, 0);
}

template <int Threads, class F>
__device__ F block_sum(F value) {
  return block_reduce<Threads>(value, Plus{});
}

template <int Threads, class F>
__device__ F block_sum_in_turn(F value, int turn) {
  return block_reduce_in_turn<Threads>(value, Plus{}, turn);
}

template <int Threads, class F>
__device__ F block_min(F value) {
  return block_reduce<Threads>(value, Minimum{});
}

template <int Threads, class F>
__device__ F block_max(F value) {
  return block_reduce<Threads>(value, Maximum{});
}

}  // namespace zamba::kernel
