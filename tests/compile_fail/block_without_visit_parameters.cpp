// SPDX-License-Identifier: MIT
// expect: zamba::Block: 'template <class P, class Visit> static constexpr void visit_parameters(P& p, Visit visit)'
#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, StateViews, StateListing, SavedViews, Forward, Backward {};
#endif
static_assert(zamba::UniformStack<2, Mixer>::layers == 2);
