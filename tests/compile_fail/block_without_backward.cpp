// SPDX-License-Identifier: MIT
// expect: zamba::Block: backward(ctx, p, d_p, saved, io, d, d_t, sequences, state, d_state) is missing, or takes
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, StateListing, SavedViews, Forward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
