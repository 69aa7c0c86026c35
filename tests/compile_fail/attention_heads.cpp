// SPDX-License-Identifier: MIT
// expect: zamba::SharedAttentionConfig: 2 * d_model must be a multiple of n_heads
// expect: detail::divides<512, 6>
#include <zamba/blocks/shared_attention.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8}>;
#else
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 6}>;
#endif
static_assert(zamba::parameter_count<Shared> > 0);
