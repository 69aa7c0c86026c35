// SPDX-License-Identifier: MIT
// expect: zamba::Block: a block that says 'shared = true' is no layer, since it has no residual of its own
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = Layer;
#else
using Mixer = SharedLayer;
#endif
using Stack = zamba::HybridStack<4, 2, Mixer, SharedLayer>;
static_assert(Stack::layers == 4);
