// SPDX-License-Identifier: MIT
// expect: zamba::SharedBlock: the shared block must say 'static constexpr bool shared = true'
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
using Block = SharedLayer;
#else
using Block = Layer;
#endif
using Stack = zamba::HybridStack<12, 6, Layer, Block>;
static_assert(Stack::layers == 12);
