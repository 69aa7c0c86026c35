// SPDX-License-Identifier: MIT
// expect: zamba::HybridStack: the period must be at least 1 and at most the number of layers
// expect: detail::at_most<6, 4>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/pattern_stack.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
constexpr zamba::Index layers = 6;
#else
constexpr zamba::Index layers = 4;
#endif
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4}>;
using Stack = zamba::HybridStack<layers, 6, Mixer, Shared>;
static_assert(zamba::parameter_count<Stack> > 0);
