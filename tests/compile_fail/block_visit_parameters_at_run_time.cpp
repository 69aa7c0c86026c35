// SPDX-License-Identifier: MIT
// expect: zamba::Block: visit_parameters must be constexpr, since the compiler counts parameters
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, StateViews, StateListing, SavedViews, Forward, Backward {
  template <class P, class Visit>
  static void visit_parameters(P& p, Visit visit) {
    visit("weight", p.weight, {{width, width}}, normal(0.02));
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
