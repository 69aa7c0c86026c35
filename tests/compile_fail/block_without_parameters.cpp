// SPDX-License-Identifier: MIT
// expect: zamba::Block: 'template <class W, class F> struct Parameters' is missing, or its arguments are others
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterListing, StateViews, StateListing, SavedViews, Forward, Backward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
