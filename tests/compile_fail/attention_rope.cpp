// SPDX-License-Identifier: MIT
// expect: zamba::SharedAttentionConfig: rope and adapters are not available yet; leave rope false and the ranks 0
#include <zamba/blocks/shared_attention.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8}>;
#else
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8, .rope = true}>;
#endif
static_assert(zamba::parameter_count<Shared> > 0);
