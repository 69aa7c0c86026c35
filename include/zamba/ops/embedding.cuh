// SPDX-License-Identifier: MIT
// embedding on CUDA, forward; equations and shapes in embedding.hpp. A thread an element; exact.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/ops/embedding.hpp>

namespace zamba {

namespace detail {

template <class A, class W>
struct EmbedElement {
  const Token* tokens;
  Matrix<const W> table;
  Matrix<A> out;

  __device__ void operator()(Index t, Index c) const { out(t, c) = A(compute_t<W>(table(Index{tokens[t]}, c))); }
};

}  // namespace detail

template <>
struct Embedding<cuda> {
  template <class A, class W>
  static void forward(Context<cuda>& ctx, const Token* tokens, Index count, Matrix<const W> table, Matrix<A> out) {
    detail::for_elements(ctx, count, table.cols(), detail::EmbedElement<A, W>{tokens, table, out}, "embedding");
  }
};

}  // namespace zamba
