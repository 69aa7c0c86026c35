// SPDX-License-Identifier: MIT
// expect: zamba::Block: forward(ctx, p, io, sequences, state, keep) is missing, takes other types, or does not return
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, StateListing, SavedViews, Backward {
  template <class Device, class W, class F, class A, class S>
  static SavedOf<A, F> forward(Context<Device>&, const ParametersOf<const W, const F>&, Matrix<const A>, Matrix<A>,
                               const Sequences&, const StateOf<S, F>&, Keep) {
    return {};
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
