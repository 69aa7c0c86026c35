// SPDX-License-Identifier: MIT
// embedding on CUDA; equations and shapes in embedding.hpp. A thread takes 16 bytes of a row, or one element where rows
// are not in such vectors; exact. Of a table of another type than the activations it takes one weight, and rounds it.
//
// Backward: a segmented sum over the positions sorted by token, see ops/embedding/backward.cuh. Sums in compute_t: of a
// token's rows in the order of the tokens, those beyond the first 64 by groups of 64. A rerun is bit-equal.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/embedding.hpp>
#include <zamba/ops/embedding/backward.cuh>

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

  template <class A, class F>
  static void backward(Context<cuda>& ctx, const Token* tokens, Index count, Matrix<const A> d_out, Matrix<F> d_table) {
    require(count <= Index{1} << 28, "embedding_backward: ", count, " tokens, wanted at most 2^28");
    if (count == 0) return;
    ArenaScope scope(ctx.arena());
    const auto sorted = kernel::sort_by_token(ctx, tokens, static_cast<int>(count), d_table.rows());
    const auto segments = ctx.arena().template tensor<kernel::TokenSegment>(count).data;
    kernel::for_elements(ctx, 1, count, kernel::FindSegments{sorted, segments}, "embedding_backward: segments");

    const auto partial = ctx.arena().template tensor<F>(ceil_div(count, kernel::rows_of_piece), d_table.cols());
    const bool whole = kernel::in_vectors(d_out) && kernel::aligned(d_table, kernel::vector_width<F>);
    kernel::for_vectors<A>(ctx, whole, count, d_out.cols(),
                           kernel::AddPieces<A>{sorted, segments, d_out, d_table, partial}, "embedding_backward: add");
    kernel::for_vectors<A>(ctx, whole, partial.rows(), d_out.cols(),
                           kernel::JoinPieces<F>{sorted, segments, partial, d_table}, "embedding_backward: join");
  }
};

}  // namespace zamba
