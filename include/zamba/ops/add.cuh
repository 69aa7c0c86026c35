// SPDX-License-Identifier: MIT
// add on CUDA: 16 bytes of a row a thread, or one element where rows are not in such vectors. Bound by memory
// bandwidth.
//
// Numeric contract: one sum in compute_t an element, rounded once when written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/add.hpp>

namespace zamba {

namespace kernel {

template <class A>
struct AddElements {
  Matrix<const A> from;
  Matrix<A> to;

  template <int Width>
  __device__ void vector(Index i, Index j) const {
    compute_t<A> sum[Width], more[Width];
    load_vector<Width>(&to(i, j)).unpack(sum);
    load_vector_streaming<Width>(&from(i, j)).unpack(more);
#pragma unroll
    for (int k = 0; k < Width; ++k) sum[k] += more[k];
    store_vector(&to(i, j), sum);
  }
};

}  // namespace kernel

template <>
struct Add<cuda> {
  template <class A>
  static void forward(Context<cuda>& ctx, Matrix<const A> from, Matrix<A> to) {
    const bool whole = kernel::in_vectors(from) && kernel::in_vectors(to);
    kernel::for_vectors<A>(ctx, whole, to.rows(), to.cols(), kernel::AddElements<A>{from, to}, "add");
  }
};

}  // namespace zamba
