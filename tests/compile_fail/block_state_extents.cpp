// SPDX-License-Identifier: MIT
// expect: zamba::Block: visit_state lists a tensor of another rank: a state is a Tensor<F, 3>
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, SavedViews {
  template <class S, class F>
  struct State {
    Tensor<F, 3> sum;
  };
  template <class S, class Visit>
  static constexpr void visit_state(S& s, Visit visit) {
    visit("sum", s.sum, {{width}});
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
