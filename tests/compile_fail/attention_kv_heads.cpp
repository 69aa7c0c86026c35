// SPDX-License-Identifier: MIT
// expect: zamba::SharedAttentionConfig: n_heads must be a multiple of n_kv_heads
// expect: detail::divides<8, 3>
#include <zamba/blocks/shared_attention.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8, .n_kv_heads = 2}>;
#else
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8, .n_kv_heads = 3}>;
#endif
static_assert(zamba::parameter_count<Shared> > 0);
