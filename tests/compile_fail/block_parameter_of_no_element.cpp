// SPDX-License-Identifier: MIT
// expect: zamba::Block: visit_parameters gives a parameter an extent below 1
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, StateViews, StateListing, SavedViews, Forward, Backward {
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("norm.weight", p.norm, {{width}}, constant(1), Decay::no);
    visit("weight", p.weight, {{width, 0}}, normal(0.02));
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
