// SPDX-License-Identifier: MIT
// expect: zamba::PatternStack: Copies must be at least 1 and at most the number of hybrid layers
// expect: detail::at_most<3, 2>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/pattern_stack.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
constexpr zamba::Index copies = 2;
#else
constexpr zamba::Index copies = 3;
#endif
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4}>;
using Stack = zamba::PatternStack<"mhmh", Mixer, Shared, copies>;
static_assert(zamba::parameter_count<Stack> > 0);
