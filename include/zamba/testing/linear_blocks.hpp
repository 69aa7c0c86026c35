// SPDX-License-Identifier: MIT
// The plainest layer and the plainest shared block, and the stack that they make with a block under test.
#pragma once

#include <zamba/block.hpp>
#include <zamba/ops/add.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba::testing::detail {

/// What both have: a weight, no state, and the sum x + t for backward.
template <Index Width>
struct LinearParts {
  static constexpr Index d_model = Width;
  static constexpr bool by_operators = true;

  template <class W, class F>
  struct Parameters {
    Weight<W> weight;
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("weight", p.weight, {{Width, Width}}, normal(0.02));
  }
  template <class S, class F>
  struct State {};
  template <class S, class Visit>
  static constexpr void visit_state(S&, Visit) {}
  template <class A, class F>
  struct Saved {
    Matrix<A> sum;
  };

  template <class A, class F, class Device>
  static Saved<A, F> sum_of(Context<Device>& ctx, const ResidualIO<A>& io, const Sequences& sequences) {
    Saved<A, F> saved{ctx.arena().template tensor<A>(sequences.tokens, Width)};
    ctx.copy(io.x, saved.sum);
    if (io.t) add(ctx, io.t, saved.sum);
    return saved;
  }
};

/// out = x + (x + t) W^T
template <Index Width>
struct LinearLayer : LinearParts<Width> {
  template <class A, class F>
  using Saved = typename LinearParts<Width>::template Saved<A, F>;
  template <class W, class F>
  using Parameters = typename LinearParts<Width>::template Parameters<W, F>;
  template <class S, class F>
  using State = typename LinearParts<Width>::template State<S, F>;

  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>&, Keep) {
    const auto saved = LinearParts<Width>::template sum_of<A, F>(ctx, io, sequences);
    linear(ctx, saved.sum, p.weight, io.out, io.x);
    return saved;
  }
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& saved, const ResidualIO<A>&, Matrix<A> d, Matrix<A> d_t, const Sequences&,
                       const State<S, F>&, const State<F, F>&) {
    ArenaScope scope(ctx.arena());
    const auto d_sum = ctx.arena().template tensor<A>(d.rows(), Width);
    linear_backward(ctx, d, saved.sum, p.weight, d_sum, Accumulate::no, d_p.weight);
    if (d_t) ctx.copy(d_sum, d_t);
    add(ctx, d_sum, d);
  }
};

/// out = (x + x0) W^T
template <Index Width>
struct LinearShared : LinearParts<Width> {
  static constexpr bool shared = true;
  template <class A, class F>
  using Saved = typename LinearParts<Width>::template Saved<A, F>;
  template <class W, class F>
  using Parameters = typename LinearParts<Width>::template Parameters<W, F>;
  template <class S, class F>
  using State = typename LinearParts<Width>::template State<S, F>;

  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>&, Keep) {
    const auto saved = LinearParts<Width>::template sum_of<A, F>(ctx, io, sequences);
    linear(ctx, saved.sum, p.weight, io.out);
    return saved;
  }
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& saved, const ResidualIO<A>&, Matrix<const A> d_out, Matrix<A> d_x,
                       Matrix<A> d_x0, const Sequences&, const State<S, F>&, const State<F, F>&) {
    linear_backward(ctx, d_out, saved.sum, p.weight, d_x, Accumulate::yes, d_p.weight);
    linear_backward(ctx, d_out, saved.sum, p.weight, d_x0, Accumulate::yes, {});
  }
};

/// A stack of the block and the plainest others.
template <class Given, bool Shared>
struct StackOf {
  using type = PatternStack<"mhm", Given, LinearShared<Given::d_model>>;
};
template <class Given>
struct StackOf<Given, true> {
  using type = PatternStack<"mhmh", LinearLayer<Given::d_model>, Given>;
};

}  // namespace zamba::testing::detail
