// SPDX-License-Identifier: MIT
// expect: zamba::SharedBlock: the shared block must say 'static constexpr bool shared = true'
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
using Reused = SharedLayer;
#else
using Reused = Layer;
#endif
using Stack = zamba::HybridStack<12, 6, Layer, Reused>;
static_assert(Stack::layers == 12);
