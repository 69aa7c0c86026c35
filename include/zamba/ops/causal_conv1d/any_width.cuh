// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA for any K, element by element, forward.
#pragma once

#include <zamba/kernel/math.cuh>
#include <zamba/number.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// The inputs of one channel, those of the past included, and what they are convolved with.
template <class A_>
struct ConvInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x;
  Matrix<const F> weight;
  Vector<const F> bias;
  Sequences sequences;
  Tensor<const F, 3> state;

  __device__ Index past() const { return weight.cols() - 1; }
  /// Input i of a row, counted from its first token in x; negative: of its past.
  __device__ F operator()(Index row, Index i, Index c) const {
    if (i >= 0) return F(x(sequences.begin(row) + i, c));
    return state && sequences.start(row) > 0 ? state(row, past() + i, c) : F(0);
  }
  /// p of token t of a row.
  __device__ F preactivation(Index row, Index t, Index c) const {
    F p = bias ? bias[c] : F(0);
    for (Index j = 0; j <= past(); ++j) p = ::fma(weight(c, j), (*this)(row, t - past() + j, c), p);
    return p;
  }
};

/// An output, from any number of inputs.
template <class A>
struct ConvolveElement {
  ConvInput<A> in;
  Matrix<A> out;

  __device__ void operator()(Index token, Index c) const {
    const Index row = row_of(in.sequences, token);
    out(token, c) = A(silu(in.preactivation(row, token - in.sequences.begin(row), c)));
  }
};

/// The state after a row's tokens: its last K - 1 inputs, oldest first, so that what is left of a longer past moves
/// before it is overwritten.
template <class A>
struct NextConvState {
  ConvInput<A> in;
  Tensor<compute_t<A>, 3> state;  // that of `in`

  __device__ void operator()(Index row, Index c) const {
    const Index length = in.sequences.length(row);
    if (length == 0) return;
    for (Index slot = 0; slot < in.past(); ++slot) state(row, slot, c) = in(row, length - in.past() + slot, c);
  }
};

}  // namespace zamba::kernel
