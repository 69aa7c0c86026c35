// SPDX-License-Identifier: MIT
// add_parts: partial sums, as blocks leave them of a weight's gradient, added to it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

inline constexpr int threads_of_parts = 256;

/// `shares` threads to a column.
template <class F, class Add>
__global__ void __launch_bounds__(threads_of_parts) add_parts_kernel(Matrix<const F> parts, int shares, Add add) {
  __shared__ F sums[threads_of_parts];
  launch_dependents();
  grid_dependency_wait();
  const int columns = threads_of_parts / shares;
  const int column = static_cast<int>(threadIdx.x) % columns, share = static_cast<int>(threadIdx.x) / columns;
  const Index c = Index{blockIdx.x} * columns + column;
  F sum = 0;
  if (c < parts.cols()) {
#pragma unroll 8
    for (Index part = share; part < parts.rows(); part += shares) sum += parts(part, c);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (share > 0 || c >= parts.cols()) return;
  for (int other = 1; other < shares; ++other) sum += sums[other * columns + column];
  add(c, sum);
}

/// add(column, sum) for the sum of each column of parts (parts, n): of every shares-th part in order, then of the
/// shares. Parts are in the L2 cache, so what counts is that many loads are under way: a thread has about the eight
/// that it begins together. Shares are up to 8, so that a warp reads whole lines.
template <class F, class Add>
void add_parts(Context<cuda>& ctx, Matrix<const F> parts, const Add& add, const char* name) {
  if (parts.cols() == 0) return;
  const auto eighths = static_cast<std::uint64_t>(std::clamp<Index>(parts.rows() / 8, 1, 8));
  const auto shares = static_cast<int>(std::bit_floor(eighths));
  const auto blocks = static_cast<unsigned>(ceil_div(parts.cols(), Index{threads_of_parts / shares}));
  launch(ctx, name, add_parts_kernel<F, Add>, blocks, threads_of_parts, 0, parts, shares, add);
}

template <class F>
struct AddToVector {
  Vector<F> to;
  __device__ void operator()(Index i, F sum) const { to[i] += sum; }
};

}  // namespace zamba::kernel
