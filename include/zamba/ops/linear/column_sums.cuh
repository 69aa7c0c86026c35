// SPDX-License-Identifier: MIT
// The bias's gradient: column sums of d_y, over fixed groups of rows and then over the groups, both in order.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// partial (groups, out): each group's sums, rows in order.
template <class A>
struct SumRowGroups {
  using F = compute_t<A>;
  Matrix<const A> rows;
  Index group_size;
  Matrix<F> partial;

  template <int Width>
  __device__ void vector(Index group, Index c) const {
    const Index end = ::min(rows.rows(), (group + 1) * group_size);
    F sums[Width] = {};
#pragma unroll 8
    for (Index t = group * group_size; t < end; ++t) {
      const auto row = load_vector<Width>(&rows(t, c));
#pragma unroll
      for (int i = 0; i < Width; ++i) sums[i] += row[i];
    }
    store_vector(&partial(group, c), sums);
  }
};

template <class F>
struct AddRowGroups {
  Matrix<const F> partial;
  Vector<F> to;

  __device__ void operator()(Index, Index c) const {
    F sum = to[c];
#pragma unroll 8
    for (Index group = 0; group < partial.rows(); ++group) sum += partial(group, c);
    to[c] = sum;
  }
};

/// Rows whose sum is one of the partial sums of n rows.
inline Index column_sums_group(Index n) {
  constexpr Index least = 32, groups_at_most = 128;
  return std::max(least, ceil_div(n, groups_at_most));
}
template <class Ctx, class F>
Matrix<F> column_sums_scratch(Ctx& ctx, Index n, Vector<F> to) {
  return ctx.arena().template tensor<F>(ceil_div(n, column_sums_group(n)), to.size());
}

/// to (out) += column sums of rows (n, out).
template <class A, class F>
void add_column_sums(Context<cuda>& ctx, Matrix<const A> rows, Vector<F> to, const char* name) {
  ArenaScope scope(ctx.arena());
  const Matrix<F> partial = column_sums_scratch(ctx, rows.rows(), to);
  const SumRowGroups<A> sums{rows, column_sums_group(rows.rows()), partial};
  for_vectors<A>(ctx, in_vectors(rows), partial.rows(), to.size(), sums, name);
  for_elements(ctx, 1, to.size(), AddRowGroups<F>{partial, to}, name);
}

}  // namespace zamba::kernel
