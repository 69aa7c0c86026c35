// SPDX-License-Identifier: MIT
// expect: zamba::SharedAttentionConfig: rope turns pairs, so head_dim = 2 * d_model / n_heads must be even
// expect: detail::divides<3, 2>
#include <zamba/blocks/shared_attention.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 12, .n_heads = 4, .rope = true}>;
#else
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 12, .n_heads = 8, .rope = true}>;
#endif
static_assert(zamba::parameter_count<Shared> > 0);
