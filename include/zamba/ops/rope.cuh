// SPDX-License-Identifier: MIT
// rope on CUDA; equations and shapes in rope.hpp.
//
// A thread turns one pair of every head of a token, so that an angle is computed once.
//
// Numeric contract: angles, cosines and sines in double, as on the CPU; the turn in compute_t, rounded once when
// written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/ops/rope.hpp>

namespace zamba {

namespace detail {

template <class A>
struct TurnPair {
  using F = compute_t<A>;
  RopeShape shape;
  Sequences sequences;
  Matrix<A> x;
  int direction;

  __device__ void operator()(Index t, Index i) const {
    const Index row = row_of(sequences, t), half = shape.head_dim / 2;
    const double position = static_cast<double>(sequences.start(row) + t - sequences.begin(row));
    const double angle =
        direction * position * ::pow(shape.theta, -2.0 * static_cast<double>(i) / static_cast<double>(shape.head_dim));
    double sine_, cosine_;
    ::sincos(angle, &sine_, &cosine_);
    const F sine = static_cast<F>(sine_), cosine = static_cast<F>(cosine_);
    for (Index head = 0; head < shape.heads; ++head) {
      A& first = x(t, head * shape.head_dim + i);
      A& second = x(t, head * shape.head_dim + half + i);
      const F a = F(first), b = F(second);
      first = A(a * cosine - b * sine);
      second = A(b * cosine + a * sine);
    }
  }
};

}  // namespace detail

template <>
struct Rope<cuda> {
  template <class A>
  static void turn(Context<cuda>& ctx, const RopeShape& shape, const Sequences& sequences, Matrix<A> x, int direction) {
    detail::for_elements(ctx, sequences.tokens, shape.head_dim / 2, detail::TurnPair<A>{shape, sequences, x, direction},
                         "rope");
  }
};

}  // namespace zamba
