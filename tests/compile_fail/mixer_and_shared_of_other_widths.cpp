// SPDX-License-Identifier: MIT
// expect: zamba::PatternStack: the mixer and the shared block must have the same d_model
// expect: detail::equal<256, 128>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
constexpr zamba::Index width = 256;
#else
constexpr zamba::Index width = 128;
#endif
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = width, .n_heads = 8}>;
using Net = zamba::LanguageModel<256, zamba::HybridStack<12, 6, Mixer, Shared>>;
static_assert(zamba::parameter_count<Net> > 0);
