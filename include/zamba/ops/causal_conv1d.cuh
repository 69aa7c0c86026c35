// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA, forward; equations and shapes in causal_conv1d.hpp.
//
// A thread takes one channel and a group of neighbouring tokens, so that a warp reads whole lines and the K - 1 earlier
// inputs come from cache. Where all rows are short it takes a row, state included; otherwise a second kernel rewrites
// the state when all outputs have read it.
//
// Numeric contract: as on the CPU, one sum over j in order, in compute_t; rounded once when written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/ops/causal_conv1d.hpp>

namespace zamba {

namespace detail {

/// The inputs of one channel, those of the past included.
template <class A_>
struct ConvInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x;
  Sequences sequences;
  Tensor<F, 3> state;
  Index K;

  /// Input i of a row, counted from its first token in x; negative: of its past.
  __device__ F operator()(Index row, Index i, Index c) const {
    if (i >= 0) return F(x(sequences.begin(row) + i, c));
    return state && sequences.start(row) > 0 ? state(row, K - 1 + i, c) : F(0);
  }
};

template <class A_>
struct CausalConv1dTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 128;
  static constexpr Index tokens = 16;  // of a thread
};

/// out of tokens [first, end) of a row, both counted from its first one.
template <class Traits>
__device__ void convolve(const ConvInput<typename Traits::A>& in, Matrix<const typename Traits::F> weight,
                         Vector<const typename Traits::F> bias, Matrix<typename Traits::A> out, Index row, Index first,
                         Index end, Index c) {
  using F = typename Traits::F;
  const Index begin = in.sequences.begin(row);
  for (Index t = first; t < end; ++t) {
    F p = bias ? bias[c] : F(0);
    for (Index j = 0; j < in.K; ++j) p += weight(c, j) * in(row, t - (in.K - 1) + j, c);
    out(begin + t, c) = typename Traits::A(p / (F(1) + ::exp(-p)));
  }
}

/// A thread takes a channel of neighbouring tokens, of whichever rows they are.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    causal_conv1d_kernel(ConvInput<typename Traits::A> in, Matrix<const typename Traits::F> weight,
                         Vector<const typename Traits::F> bias, Matrix<typename Traits::A> out) {
  const Index c = Index{blockIdx.y} * Traits::threads + threadIdx.x;
  if (c >= out.cols()) return;
  const Sequences& sequences = in.sequences;
  const Index last = ::min((Index{blockIdx.x} + 1) * Traits::tokens, sequences.tokens);
  for (Index t = Index{blockIdx.x} * Traits::tokens; t < last;) {
    const Index row = row_of(sequences, t), begin = sequences.begin(row);
    const Index end = ::min(last, begin + sequences.length(row));
    convolve<Traits>(in, weight, bias, out, row, t - begin, end - begin, c);
    t = end;
  }
}

/// The state after a row's tokens: its last K - 1 inputs, oldest first, so that what is left of a longer past moves
/// before it is overwritten.
template <class A>
struct NextConvState {
  ConvInput<A> in;

  __device__ void operator()(Index row, Index c) const {
    const Index length = in.sequences.length(row);
    if (length == 0) return;
    for (Index slot = 0; slot < in.K - 1; ++slot) in.state(row, slot, c) = in(row, length - (in.K - 1) + slot, c);
  }
};

/// A thread takes a channel of a short row, and the state of it.
template <class Traits>
struct ConvolveRow {
  ConvInput<typename Traits::A> in;
  Matrix<const typename Traits::F> weight;
  Vector<const typename Traits::F> bias;
  Matrix<typename Traits::A> out;

  __device__ void operator()(Index row, Index c) const {
    convolve<Traits>(in, weight, bias, out, row, 0, in.sequences.length(row), c);
    if (in.state) NextConvState<typename Traits::A>{in}(row, c);
  }
};

}  // namespace detail

template <>
struct CausalConv1d<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const F> weight, Vector<const F> bias,
                      const Sequences& sequences, Tensor<F, 3> state, Matrix<A> out) {
    using Traits = detail::CausalConv1dTraits<A>;
    if (sequences.tokens == 0) return;
    const detail::ConvInput<A> in{x, sequences, state, weight.cols()};
    if (sequences.longest <= Traits::tokens)
      return detail::for_elements(ctx, sequences.rows, x.cols(), detail::ConvolveRow<Traits>{in, weight, bias, out},
                                  "causal_conv1d");
    const dim3 grid(detail::blocks_for(sequences.tokens, Traits::tokens),
                    detail::blocks_for(x.cols(), Traits::threads));
    detail::causal_conv1d_kernel<Traits><<<grid, Traits::threads, 0, ctx.stream()>>>(in, weight, bias, out);
    detail::check_launch("causal_conv1d");
    if (state)
      detail::for_elements(ctx, sequences.rows, x.cols(), detail::NextConvState<A>{in}, "causal_conv1d: state");
  }
};

}  // namespace zamba
