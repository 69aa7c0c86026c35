// SPDX-License-Identifier: MIT
// The backward pass of causal_conv1d on CUDA for any K, element by element; of the initial states for every K. Whatever
// needs d_p computes it again.
#pragma once

#include <zamba/kernel/math.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/causal_conv1d/any_width.cuh>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// d_p, zero beyond a row's end.
template <class A>
struct ConvGradient {
  using F = compute_t<A>;
  ConvInput<A> in;
  Matrix<const A> d_out;

  __device__ F operator()(Index row, Index t, Index c) const {
    if (t >= in.sequences.length(row)) return 0;
    const F p = in.preactivation(row, t, c);
    return F(d_out(in.sequences.begin(row) + t, c)) * silu_slope(p, sigmoid(p));
  }
};

/// d_x: sum_j weight[:, j] * d_p_{t + (K-1) - j}, and what came through the final state.
template <class A>
struct ConvInputGradient {
  ConvGradient<A> d_p;
  Tensor<const compute_t<A>, 3> d_state;
  Matrix<A> d_x;

  __device__ void operator()(Index token, Index c) const {
    const auto& in = d_p.in;
    const Index row = row_of(in.sequences, token), t = token - in.sequences.begin(row);
    compute_t<A> sum = 0;
    for (Index j = 0; j <= in.past(); ++j) sum = ::fma(in.weight(c, j), d_p(row, t + in.past() - j, c), sum);
    const Index slot = t - in.sequences.length(row) + in.past();  // where the final state holds this input
    if (d_state && slot >= 0) sum += d_state(row, slot, c);
    d_x(token, c) = A(sum);
  }
};

/// The share of a group of tokens in d_weight, transposed, and d_bias: partial (groups, K + 1, D).
template <class A>
struct ConvWeightGradient {
  using F = compute_t<A>;
  ConvGradient<A> d_p;
  Index group_size;
  Tensor<F, 3> partial;

  /// part: group * (K + 1) + j
  __device__ void operator()(Index part, Index c) const {
    const auto& in = d_p.in;
    const Index K = in.past() + 1, group = part / (K + 1), j = part % (K + 1);
    const Index first = group * group_size, end = ::min(first + group_size, in.sequences.tokens);
    F sum = 0;
    Index row = row_of(in.sequences, first);
    for (Index token = first; token < end; ++token) {
      while (in.sequences.offsets[row + 1] <= token) ++row;
      const Index t = token - in.sequences.begin(row);
      const F d = d_p(row, t, c);
      sum = j < K ? ::fma(d, in(row, t - in.past() + j, c), sum) : sum + d;
    }
    partial(group, j, c) = sum;
  }
};

/// Adds to d_weight and d_bias the sums of their parts, K rows of d_weight, transposed, and one of d_bias.
template <class F>
struct AddConvSums {
  Matrix<F> d_weight;
  Vector<F> d_bias;

  __device__ void operator()(Index i, F sum) const {
    const Index D = d_weight.rows(), j = i / D, c = i % D;
    if (j < d_weight.cols())
      d_weight(c, j) += sum;
    else if (d_bias)
      d_bias[c] += sum;
  }
};

/// The gradient of a row's final state becomes that of its initial one.
template <class A>
struct ConvStateGradient {
  ConvGradient<A> d_p;
  Tensor<compute_t<A>, 3> d_state;

  __device__ void operator()(Index row, Index c) const {
    const auto& in = d_p.in;
    const Index length = in.sequences.length(row);
    if (length == 0) return;
    // Newest first: slot s of the initial state is slot s - length of the final one, if that is still there.
    for (Index slot = in.past() - 1; slot >= 0; --slot) {
      compute_t<A> sum = 0;
      if (in.sequences.start(row) > 0) {
        if (slot >= length) sum = d_state(row, slot - length, c);
        for (Index j = 0; j <= slot; ++j) sum = ::fma(in.weight(c, j), d_p(row, slot - j, c), sum);
      }
      d_state(row, slot, c) = sum;
    }
  }
};

}  // namespace zamba::kernel
