// SPDX-License-Identifier: MIT
// expect: zamba::Block: a block says its width, at least 1: 'static constexpr Index d_model'
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : ParameterViews, ParameterListing, StateViews, StateListing, SavedViews, Forward, Backward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
