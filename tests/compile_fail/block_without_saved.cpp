// SPDX-License-Identifier: MIT
// expect: zamba::Block: 'template <class A, class F> struct Saved' is missing, or its arguments are others
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, StateListing, Forward, Backward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
