// SPDX-License-Identifier: MIT
// expect: zamba::Block: 'template <class A, class F> struct Saved' is missing, or its arguments are others
#include <zamba/testing/conformance.hpp>

#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {};
#else
struct Mixer : Width, ParameterViews, ParameterListing, StateViews, StateListing, Forward, Backward {};
#endif
bool check() { return zamba::testing::conformance<Mixer, zamba::testing::Passes::float64_alone>().passed(); }
