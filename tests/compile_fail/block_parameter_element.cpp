// SPDX-License-Identifier: MIT
// expect: zamba::Block: visit_parameters lists a parameter whose elements are neither W nor F
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, StateViews, StateListing, SavedViews {
  template <class W, class F>
  struct Parameters {
    Vector<float> norm;
    Matrix<W> weight;
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    ParameterListing::visit_parameters(p, visit);
  }
};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
