// SPDX-License-Identifier: MIT
// expect: zamba::LanguageModel: the vocabulary must hold at least one token
// expect: detail::at_least<0, 1>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
constexpr zamba::Index vocabulary = 256;
#else
constexpr zamba::Index vocabulary = 0;
#endif
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
using Net = zamba::LanguageModel<vocabulary, zamba::UniformStack<4, Mixer>>;
static_assert(zamba::parameter_count<Net> >= 0);
