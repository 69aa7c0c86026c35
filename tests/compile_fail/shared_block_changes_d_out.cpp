// SPDX-License-Identifier: MIT
// expect: zamba::SharedBlock: backward(ctx, p, d_p, saved, io, d_out, d_x, d_x0, sequences, state, d_state)
// expect: d_out is a Matrix<const A>
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Reused : SharedLayer {};
#else
struct Reused : Width, SharedFlag, ParameterViews, ParameterListing, StateViews, StateListing, SavedViews, Forward {
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>&, const ParametersOf<const W, const F>&, const ParametersOf<F, F>&,
                       const SavedOf<A, F>&, const ResidualIO<A>&, Matrix<A>, Matrix<A>, Matrix<A>, const Sequences&,
                       const StateOf<S, F>&, const StateOf<F, F>&) {}
};
#endif
using Stack = zamba::HybridStack<4, 2, Layer, Reused>;
static_assert(Stack::layers == 4);
