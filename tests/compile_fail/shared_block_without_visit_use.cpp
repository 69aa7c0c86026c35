// SPDX-License-Identifier: MIT
// expect: zamba::SharedBlock: UseParameters without
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
};
#endif
using Stack = zamba::HybridStack<4, 2, Layer, Reused>;
static_assert(Stack::layers == 4);
