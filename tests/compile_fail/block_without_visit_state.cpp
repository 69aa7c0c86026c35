// SPDX-License-Identifier: MIT
// expect: zamba::Block: 'template <class S, class Visit> static constexpr void visit_state(S& s, Visit visit)' is
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, SavedViews, Forward, Backward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
