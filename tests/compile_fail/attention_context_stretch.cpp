// SPDX-License-Identifier: MIT
// expect: zamba::SharedAttentionConfig: context_stretch is 1, or above 1 with rope and a head_dim of at least 4
#include <zamba/blocks/shared_attention.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
constexpr bool rope = true;
#else
constexpr bool rope = false;
#endif
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{
    .d_model = 256, .n_heads = 8, .rope = rope, .context_stretch = 8}>;
static_assert(zamba::parameter_count<Shared> > 0);
