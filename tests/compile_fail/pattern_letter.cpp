// SPDX-License-Identifier: MIT
// expect: zamba::PatternStack: the pattern must be a non-empty text of 'm' (plain) and 'h' (hybrid)
// expect: detail::letter_of_layer<'x', 2>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/pattern_stack.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4}>;
#ifndef ZAMBA_EXPECT_FAILURE
using Stack = zamba::PatternStack<"mhmh", Mixer, Shared>;
#else
using Stack = zamba::PatternStack<"mhxh", Mixer, Shared>;
#endif
static_assert(zamba::parameter_count<Stack> > 0);
