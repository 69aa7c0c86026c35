// SPDX-License-Identifier: MIT
// expect: zamba::Block: visit_state lists a cache whose elements are neither S nor F
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, SavedViews {
  template <class S, class F>
  struct State {
    Tensor<double, 3> keys;
  };
  template <class S, class Visit>
  static constexpr void visit_state(S& s, Visit visit) {
    visit.cache("keys", s.keys, width);
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
