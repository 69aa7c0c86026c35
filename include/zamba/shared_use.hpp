// SPDX-License-Identifier: MIT
// SharedUse<B>: one use of a shared block B, with all the parameters that it meets.
//
// A stack applies a shared block to its stream x and to its own input x0, outside the residual stream. It is written
// like a block, but says so, reads x0 as io.t, writes an out that is neither, and has a backward that adds:
//
//   static constexpr bool shared = true;
//   backward(ctx, p, d_p, saved, io, d_out, d_x, d_x0, sequences, state, d_state)
//
// where d_out, a Matrix<const A>, is only read.
// Its Parameters exist once for all of its uses. What each use has for itself, it lists apart:
//
//   template <class W, class F> struct UseParameters;
//   visit_use_parameters(use, visit)
//
// and takes after them: forward(ctx, p, use, io, ...), backward(ctx, p, use, d_p, d_use, saved, ...). Both kinds are
// one here: a shared block whose Parameters are the block's own, and those of the use where it has any.
#pragma once

#include <zamba/block.hpp>

namespace zamba {

namespace detail {

template <class B, class W, class F>
struct UseParametersOf {
  struct type {};
};
template <HasUseParameters B, class W, class F>
struct UseParametersOf<B, W, F> {
  using type = typename B::template UseParameters<W, F>;
};

}  // namespace detail

template <class B>
struct SharedUse {
  static constexpr bool shared = true;
  static constexpr Index d_model = B::d_model;

  /// What a use of B has for itself, views of nothing where that is nothing.
  template <class W, class F>
  using UseParameters = typename detail::UseParametersOf<B, W, F>::type;

  template <class P, class Visit>
  static constexpr void visit_use_parameters(P& p, Visit visit) {
    if constexpr (detail::HasUseParameters<B>) B::visit_use_parameters(p, visit);
  }

  template <class W, class F>
  struct Parameters {
    typename B::template Parameters<W, F> block;
    UseParameters<W, F> use;
  };

  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    B::visit_parameters(p.block, visit);
    visit_use_parameters(p.use, visit);
  }

  static constexpr Index active_parameters =
      active_parameter_count<B> + (detail::count_parameters<SharedUse>().count - parameter_count<B>);

  template <class S, class F>
  using State = typename B::template State<S, F>;
  template <class A, class F>
  using Saved = typename B::template Saved<A, F>;

  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    B::visit_state(s, visit);
  }

  template <class Device, class W, class F, class A, class States>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const States& state, Keep keep) {
    if constexpr (detail::HasUseParameters<B>)
      return B::forward(ctx, p.block, p.use, io, sequences, state, keep);
    else
      return B::forward(ctx, p.block, io, sequences, state, keep);
  }

  template <class Device, class W, class F, class A, class States>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& saved, const ResidualIO<A>& io, std::type_identity_t<Matrix<const A>> d_out,
                       Matrix<A> d_x, Matrix<A> d_x0, const Sequences& sequences, const States& state,
                       const State<F, F>& d_state) {
    if constexpr (detail::HasUseParameters<B>)
      B::backward(ctx, p.block, p.use, d_p.block, d_p.use, saved, io, d_out, d_x, d_x0, sequences, state, d_state);
    else
      B::backward(ctx, p.block, d_p.block, saved, io, d_out, d_x, d_x0, sequences, state, d_state);
  }
};

}  // namespace zamba
