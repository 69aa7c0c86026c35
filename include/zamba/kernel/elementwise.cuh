// SPDX-License-Identifier: MIT
// Elementwise kernels: one functor for every element of a (rows, cols) range, or for every 16 bytes of it. Columns lie
// across the grid; rows, which may be more than a grid has, are a grid-stride loop.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>

namespace zamba::kernel {

/// Blocks across, which may be 2^31 - 1: for so many columns, each thread having `width` of them.
inline unsigned blocks_across(Index cols, Index width) {
  return static_cast<unsigned>(ceil_div(cols, width * Index{elementwise_threads}));
}

/// Blocks across: columns; down: rows, a grid at a time.
template <class F>
__global__ void __launch_bounds__(elementwise_threads) elementwise_kernel(Index rows, Index cols, F f) {
  const Index col = Index{blockIdx.x} * elementwise_threads + threadIdx.x;
  if (col >= cols) return;
  for (Index row = blockIdx.y; row < rows; row += gridDim.y) f(row, col);
}

/// f(row, col) on the device for every element. F is a named type: kernels are templates on types.
template <class F>
void for_elements(Context<cuda>& ctx, Index rows, Index cols, const F& f, const char* name) {
  if (rows == 0 || cols == 0) return;
  const dim3 grid(blocks_across(cols, 1), static_cast<unsigned>(std::min<Index>(rows, 65535)));
  elementwise_kernel<<<grid, elementwise_threads, 0, ctx.stream()>>>(rows, cols, f);
  check_launch(name);
}

/// Blocks across: vectors of a row; down: rows, a grid at a time.
template <class Width, class F>
__global__ void __launch_bounds__(elementwise_threads) vectorized_kernel(Index rows, Index cols, F f) {
  launch_dependents();
  grid_dependency_wait();
  const Index col = (Index{blockIdx.x} * elementwise_threads + threadIdx.x) * Width::value;
  if (col >= cols) return;
  for (Index row = blockIdx.y; row < rows; row += gridDim.y) f.template vector<Width::value>(row, col);
}

/// f.vector<N>(row, first column of N) on the device for every N elements of the rows: 16 bytes of A where `whole`
/// says that all matrices are in such vectors, one element where not.
template <class A, class F>
void for_vectors(Context<cuda>& ctx, bool whole, Index rows, Index cols, const F& f, const char* name) {
  if (rows == 0 || cols == 0) return;
  const auto down = static_cast<unsigned>(std::min<Index>(rows, 65535));
  if (whole) {
    using Width = std::integral_constant<int, vector_width<A>>;
    const dim3 grid(blocks_across(cols, Width::value), down);
    launch(ctx, overlap_for(rows), name, vectorized_kernel<Width, F>, grid, elementwise_threads, 0, rows, cols, f);
  } else {
    using Width = std::integral_constant<int, 1>;
    const dim3 grid(blocks_across(cols, Width::value), down);
    launch(ctx, overlap_for(rows), name, vectorized_kernel<Width, F>, grid, elementwise_threads, 0, rows, cols, f);
  }
}

}  // namespace zamba::kernel
