// SPDX-License-Identifier: MIT
// expect: zamba::Block: visit_state must be constexpr, since the compiler counts the bytes of states
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, SavedViews, Forward, Backward {
  template <class S, class Visit>
  static void visit_state(S& s, Visit visit) {
    visit("sum", s.sum, {{1, width}});
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
