// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA for any K, element by element.
#pragma once

#include <zamba/kernel/math.cuh>
#include <zamba/number.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

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

/// An output, from any number of inputs.
template <class A_>
struct ConvolveElement {
  using A = A_;
  using F = compute_t<A>;
  ConvInput<A> in;
  Matrix<const F> weight;
  Vector<const F> bias;
  Matrix<A> out;

  __device__ void operator()(Index token, Index c) const {
    const Index row = row_of(in.sequences, token), t = token - in.sequences.begin(row);
    F p = bias ? bias[c] : F(0);
    for (Index j = 0; j < in.K; ++j) p = ::fma(weight(c, j), in(row, t - (in.K - 1) + j, c), p);
    out(token, c) = A(silu(p));
  }
};

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

}  // namespace zamba::kernel
