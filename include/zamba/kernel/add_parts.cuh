// SPDX-License-Identifier: MIT
// add_parts: partial sums, as blocks leave them of a weight's gradient, added to it.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Columns of a block and the threads that share one. Parts are many and columns few, and all of them are in the L2
/// cache: what counts is that many loads are under way, so a block is as narrow as the 32 bytes that are read at once.
inline constexpr int columns_of_parts = 8, threads_of_parts = 256;

template <class F, class Add>
__global__ void __launch_bounds__(threads_of_parts) add_parts_kernel(Matrix<const F> parts, Add add) {
  constexpr int shares = threads_of_parts / columns_of_parts;
  __shared__ F sums[shares][columns_of_parts];
  launch_dependents();
  grid_dependency_wait();
  const int column = threadIdx.x % columns_of_parts, share = threadIdx.x / columns_of_parts;
  const Index c = Index{blockIdx.x} * columns_of_parts + column;
  F sum = 0;
  if (c < parts.cols()) {
#pragma unroll 8
    for (Index part = share; part < parts.rows(); part += shares) sum += parts(part, c);
  }
  sums[share][column] = sum;
  __syncthreads();
  if (share > 0 || c >= parts.cols()) return;
#pragma unroll
  for (int other = 1; other < shares; ++other) sum += sums[other][column];
  add(c, sum);
}

/// add(column, sum) for the sum of each column of parts (parts, n): of every 32nd part in order, then of these 32.
template <class F, class Add>
void add_parts(Context<cuda>& ctx, Matrix<const F> parts, const Add& add, const char* name) {
  if (parts.cols() == 0) return;
  launch(ctx, name, add_parts_kernel<F, Add>,
         static_cast<unsigned>(ceil_div(parts.cols(), Index{columns_of_parts})), threads_of_parts, 0, parts, add);
}

template <class F>
struct AddToVector {
  Vector<F> to;
  __device__ void operator()(Index i, F sum) const { to[i] += sum; }
};

}  // namespace zamba::kernel
