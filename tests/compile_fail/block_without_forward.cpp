// SPDX-License-Identifier: MIT
// expect: zamba::Block: forward(ctx, p, io, sequences, state, keep) is missing, takes other types, or does not return
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, StateListing, SavedViews, Backward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
