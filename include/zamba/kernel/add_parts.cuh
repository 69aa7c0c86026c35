// SPDX-License-Identifier: MIT
// add_parts: partial sums, as blocks leave them of a weight's gradient, added to it.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Columns of a block, and the threads that share one.
inline constexpr int columns_of_parts = warp_size, threads_of_parts = 256;

template <class F>
__global__ void __launch_bounds__(threads_of_parts) add_parts_kernel(Matrix<const F> parts, Vector<F> to) {
  constexpr int shares = threads_of_parts / columns_of_parts;
  __shared__ F sums[shares][columns_of_parts];
  launch_dependents();
  grid_dependency_wait();
  const int column = threadIdx.x % columns_of_parts, share = threadIdx.x / columns_of_parts;
  const Index c = Index{blockIdx.x} * columns_of_parts + column;
  F sum = 0;
  if (c < to.size()) {
#pragma unroll 8
    for (Index part = share; part < parts.rows(); part += shares) sum += parts(part, c);
  }
  sums[share][column] = sum;
  __syncthreads();
  if (share > 0 || c >= to.size()) return;
#pragma unroll
  for (int other = 1; other < shares; ++other) sum += sums[other][column];
  to[c] += sum;
}

/// to (n) += the sum of parts (parts, n): of every eighth in order, then of these eight.
template <class F>
void add_parts(Context<cuda>& ctx, Matrix<const F> parts, Vector<F> to, const char* name) {
  if (to.size() == 0) return;
  launch(ctx, name, add_parts_kernel<F>, static_cast<unsigned>(ceil_div(to.size(), Index{columns_of_parts})),
         threads_of_parts, 0, parts, to);
}

}  // namespace zamba::kernel
