// SPDX-License-Identifier: MIT
// expect: zamba::Block: a block that says 'shared = true' is no layer, since it has no residual of its own
#include <zamba/language_model.hpp>

#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
using Stack = Layer;
#else
using Stack = SharedLayer;
#endif
static_assert(zamba::LanguageModel<256, Stack>::vocabulary == 256);
