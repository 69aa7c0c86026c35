// SPDX-License-Identifier: MIT
// embedding on CUDA, forward; equations and shapes in embedding.hpp. A thread takes 16 bytes of a row, or one element
// where rows are not in such pieces; exact. Of a table of another type than the activations it takes one weight, and
// rounds it.
#pragma once

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

/// table(o, k) is a number.
template <class A, class Weights>
struct EmbedElement {
  const Token* tokens;
  Weights table;
  Matrix<A> out;

  __device__ void operator()(Index t, Index c) const {
    out(t, c) = static_cast<A>(static_cast<compute_t<A>>(table(Index{tokens[t]}, c)));
  }
};

}  // namespace kernel

template <>
struct Embedding<cuda> {
  template <class A>
  static void forward(Context<cuda>& ctx, const Token* tokens, Index count, Matrix<const A> table, Matrix<A> out) {
    kernel::for_vectors<A>(ctx, kernel::in_vectors(table) && kernel::in_vectors(out), count, table.cols(),
                           kernel::EmbedRows<A>{tokens, table, out}, "embedding");
  }

  template <class A, class Weights>
  static void forward(Context<cuda>& ctx, const Token* tokens, Index count, const Weights& table, Matrix<A> out) {
    kernel::for_elements(ctx, count, table.cols(), kernel::EmbedElement<A, Weights>{tokens, table, out}, "embedding");
  }
};

}  // namespace zamba
