// SPDX-License-Identifier: MIT
// rope: rotary position embedding, in place, of queries or keys.
//
//   angle_i = position * theta^(-2 i / P),   i in [0, P / 2)
//   [a_i, b_i] = [a_i cos - b_i sin,  b_i cos + a_i sin]        a: the first half of a head, b: the second
//
// Source: RoFormer (arXiv 2104.09864), with halves instead of neighbours, as Llama and Zamba2 use it.
//
// Shapes: x (tokens, heads * P). A token's position counts from the start of its sequence, cached ones included.
// Kept for the backward pass: nothing; gradients are turned back by the same angles.
//
// Numeric contract: angles, cosines and sines in double, rounded to the type of x once; so a long context costs no
// precision.
#pragma once

#include <algorithm>
#include <cmath>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/op.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// How heads are turned.
struct RopeShape {
  Index heads, head_dim;
  double theta;
};

ZAMBA_DECLARE_OPERATOR(Rope, "rope.cuh");

/// Turns every head of x (tokens, heads * head_dim) by its token's position.
template <class Device, class A>
void rope(Context<Device>& ctx, const RopeShape& shape, const Sequences& sequences, Matrix<A> x) {
  if constexpr (checked) {
    const kernel::Door door{"rope"};
    door.shape("x", x, sequences.tokens, shape.heads * shape.head_dim);
  }
  Rope<Device>::turn(ctx, shape, sequences, x, +1);
}

/// Turns the gradient d_x (tokens, heads * head_dim) back.
template <class Device, class A>
void rope_backward(Context<Device>& ctx, const RopeShape& shape, const Sequences& sequences, Matrix<A> d_x) {
  if constexpr (checked) {
    const kernel::Door door{"rope_backward"};
    door.shape("d_x", d_x, sequences.tokens, shape.heads * shape.head_dim);
  }
  Rope<Device>::turn(ctx, shape, sequences, d_x, -1);
}

template <>
struct Rope<cpu> {
  /// direction: +1 or -1.
  template <class A>
  static void turn(Context<cpu>& ctx, const RopeShape& shape, const Sequences& sequences, Matrix<A> x, int direction) {
    const Index half = shape.head_dim / 2, groups = ceil_div(sequences.tokens, group);
    ArenaScope scope(ctx.arena());
    const auto [frequencies, tables] = scratch(ctx, shape, sequences, x, direction);
    for (Index i = 0; i < half; ++i)
      frequencies[i] =
          direction * std::pow(shape.theta, -2.0 * static_cast<double>(i) / static_cast<double>(shape.head_dim));
    ctx.parallel_for(groups, [&, frequencies = frequencies, tables = tables](Index g, int worker) {
      A *const cosines = &tables(worker, 0), *const sines = cosines + half;
      const Index end = std::min((g + 1) * group, sequences.tokens);
      Index row = row_of(sequences, g * group);
      for (Index t = g * group; t < end; ++t) {
        while (t >= sequences.offsets[row + 1]) ++row;
        const double position = static_cast<double>(sequences.start(row) + t - sequences.offsets[row]);
        for (Index i = 0; i < half; ++i) {
          cosines[i] = static_cast<A>(std::cos(position * frequencies[i]));
          sines[i] = static_cast<A>(std::sin(position * frequencies[i]));
        }
        for (Index head = 0; head < shape.heads; ++head) turn_head(&x(t, head * shape.head_dim), half, cosines, sines);
      }
    });
  }

  template <class A>
  struct Scratch {
    Vector<double> frequencies;  // (head_dim / 2)
    Matrix<A> tables;            // (threads, head_dim): cosines, then sines, of a position
  };
  template <class Ctx, class A>
  static Scratch<A> scratch(Ctx& ctx, const RopeShape& shape, const Sequences&, Matrix<A>, int) {
    const Index half = shape.head_dim / 2;
    return {ctx.arena().template tensor<double>(half), ctx.arena().template tensor<A>(Index{ctx.threads()}, 2 * half)};
  }

 private:
  /// Tokens of a task.
  static constexpr Index group = 16;

  template <class A>
  static void turn_head(A* head, Index half, const A* cosines, const A* sines) {
    kernel::for_packs<A>(half, [&](Index i, auto count) {
      using Pack = kernel::Pack<A>;
      const Pack a = kernel::load(head + i, count), b = kernel::load(head + half + i, count);
      const Pack cosine = kernel::load(cosines + i, count), sine = kernel::load(sines + i, count);
      kernel::store(head + i, Pack(a * cosine - b * sine), count);
      kernel::store(head + half + i, Pack(b * cosine + a * sine), count);
    });
  }
};

}  // namespace zamba
