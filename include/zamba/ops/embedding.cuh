// SPDX-License-Identifier: MIT
// embedding on CUDA, forward; equations and shapes in embedding.hpp. A thread takes 16 bytes of a row, or one element
// where rows are not in such vectors; exact.
#pragma once

#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/embedding.hpp>

namespace zamba {

namespace kernel {

template <class A>
struct EmbedRows {
  const Token* tokens;
  Matrix<const A> table;
  Matrix<A> out;

  template <int Width>
  __device__ void vector(Index t, Index c) const {
    store_vector(&out(t, c), load_vector<Width>(&table(Index{tokens[t]}, c)));
  }
};

}  // namespace kernel

template <>
struct Embedding<cuda> {
  template <class A, class W>
  static void forward(Context<cuda>& ctx, const Token* tokens, Index count, Matrix<const W> table, Matrix<A> out) {
    static_assert(std::is_same_v<A, W>, "zamba: on CUDA activations are of the type of the weights");
    kernel::for_vectors<A>(ctx, kernel::in_vectors(table) && kernel::in_vectors(out), count, table.cols(),
                           kernel::EmbedRows<A>{tokens, table, out}, "embedding");
  }
};

}  // namespace zamba
