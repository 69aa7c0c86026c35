// SPDX-License-Identifier: MIT
// expect: zamba::SharedBlock: forward(ctx, p, io, sequences, state, keep), with 'use' after p where there are
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Reused : SharedLayer {};
#else
struct Reused : SharedLayer {
  template <class W, class F>
  struct UseParameters {
    Vector<F> scale;
  };
  template <class P, class Visit>
  static constexpr void visit_use_parameters(P& use, Visit visit) {
    visit("scale", use.scale, {{width}}, constant(1));
  }
};
#endif
using Stack = zamba::HybridStack<4, 2, Layer, Reused>;
static_assert(Stack::layers == 4);
