// SPDX-License-Identifier: MIT
// LowRankAdapter: what one use of a shared product has for itself, beside the weights that all uses share.
//
//   y += (x A^T) B^T          A (rank, in), B (out, rank)
//
// Source: LoRA (arXiv 2106.09685); as a part of the model itself, one for every use: Zamba2 (arXiv 2411.15242).
// A part of blocks, not a block. Rank 0 is none: no parameters, and forward and backward do nothing.
//
// Kept for the backward pass: x A^T (tokens, rank).
#pragma once

#include <zamba/block.hpp>
#include <zamba/ops/linear.hpp>

namespace zamba {

template <Index In, Index Out, Index Rank>
struct LowRankAdapter {
  static_assert(detail::at_least<Rank, 0>, "zamba::LowRankAdapter: the rank must be 0 (none) or more");

  template <class W>
  struct Parameters {
    Weight<W> a;  // (rank, in)
    Weight<W> b;  // (out, rank)
  };

  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit, double init_std = 0) {
    if (Rank == 0) return;
    visit("a.weight", p.a, {{Rank, In}}, fan_in(In, init_std));
    visit("b.weight", p.b, {{Out, Rank}}, fan_in(Rank, init_std));
  }

  /// Room for what is kept, (tokens, rank).
  template <class A, class Arena>
  static Matrix<A> room(Arena& arena, Index tokens) {
    if (Rank == 0) return {};
    return arena.template tensor<A>(tokens, Rank);
  }

  /// Adds to y (tokens, out); low is kept.
  template <class Device, class W, class A>
  static void forward(Context<Device>& ctx, const Parameters<const W>& p, std::type_identity_t<Matrix<const A>> x,
                      std::type_identity_t<Matrix<A>> low, Matrix<A> y) {
    if (Rank == 0) return;
    linear(ctx, x, p.a, low);
    linear(ctx, low, p.b, y, y);
  }

  /// d_x is added to.
  template <class Device, class W, class F, class A>
  static void backward(Context<Device>& ctx, const Parameters<const W>& p, const Parameters<F>& d_p,
                       std::type_identity_t<Matrix<const A>> x, std::type_identity_t<Matrix<const A>> low,
                       std::type_identity_t<Matrix<const A>> d_y, Matrix<A> d_x) {
    if (Rank == 0) return;
    ArenaScope scope(ctx.arena());
    const auto d_low = ctx.arena().template tensor<A>(x.rows(), Rank);
    linear_backward(ctx, d_y, low, p.b, d_low, Accumulate::no, d_p.b);
    linear_backward(ctx, d_low, x, p.a, d_x, Accumulate::yes, d_p.a);
  }
};

}  // namespace zamba
