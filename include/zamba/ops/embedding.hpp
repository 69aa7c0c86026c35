// SPDX-License-Identifier: MIT
// embedding: the row of a table for every token.
//
//   forward    out_t = table[tokens_t]               table (V, d), out (count, d)
//   backward   d_table[tokens_t] += d_out_t          d_table (V, d)
//
// Kept for the backward pass: the tokens. Token ids are in [0, V): they are checked where they enter the library.
//
// Numeric contract: forward is exact. Backward adds in the order of the tokens, in float (double for double), whatever
// the number of threads: each thread owns columns of the table, so repeated tokens meet no race.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/load_weights.hpp>
#include <zamba/op.hpp>
#include <zamba/tensor.hpp>
#include <zamba/weight.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(Embedding, "embedding.cuh");

template <>
struct Embedding<cpu> {
  template <class A, class Weights>
  static void forward(Context<cpu>& ctx, const Token* tokens, Index count, const Weights& table, Matrix<A> out) {
    constexpr Index rows = 16;  // of one task
    ctx.parallel_for(ceil_div(count, rows), [&](Index i, int) {
      for (Index t = i * rows; t < std::min(count, (i + 1) * rows); ++t)
        kernel::for_packs<A>(table.cols(), [&](Index k, auto n) {
          kernel::store<A>(&out(t, k), kernel::load_weights<A>(table, Index{tokens[t]}, k, n), n);
        });
    });
  }

  template <class A, class F>
  static void backward(Context<cpu>& ctx, const Token* tokens, Index count, Matrix<const A> d_out, Matrix<F> d_table) {
    constexpr Index columns = 64;  // of one task
    ctx.parallel_for(ceil_div(d_table.cols(), columns), [&](Index i, int) {
      const Index first = i * columns, width = std::min(columns, d_table.cols() - first);
      for (Index t = 0; t < count; ++t) {
        const A* from = d_out.data + t * d_out.stride[0] + first;
        F* to = d_table.data + tokens[t] * d_table.stride[0] + first;
        for (Index k = 0; k < width; ++k) to[k] += static_cast<F>(from[k]);
      }
    });
  }
};

/// out_t = table[tokens_t] for `count` tokens; `tokens` is readable by the device, `table` any Weight.
template <class D, class A, class Weights>
void embedding(Context<D>& ctx, const Token* tokens, Index count, const Weights& table, Matrix<A> out) {
  if constexpr (checked) {
    const kernel::Door door{"embedding"};
    door.shape("out", out, count, table.cols());
  }
  Embedding<D>::forward(ctx, tokens, count, detail::read_only(table), out);
}

/// d_table[tokens_t] += d_out_t.
template <class D, class A, class F>
void embedding_backward(Context<D>& ctx, const Token* tokens, Index count, Tensor<A, 2> d_out, Matrix<F> d_table) {
  if constexpr (checked) {
    const kernel::Door door{"embedding_backward"};
    door.shape("d_out", d_out, count, d_table.cols());
  }
  Embedding<D>::backward(ctx, tokens, count, Matrix<const std::remove_const_t<A>>(d_out), d_table);
}

}  // namespace zamba
