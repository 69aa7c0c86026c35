// SPDX-License-Identifier: MIT
// expect: zamba::TransformerConfig: d_model must be an even multiple of n_heads
// expect: detail::divides<256, 6>
#include <zamba/blocks/transformer_block.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Layer = zamba::TransformerBlock<zamba::TransformerConfig{.d_model = 256, .n_heads = 4}>;
#else
using Layer = zamba::TransformerBlock<zamba::TransformerConfig{.d_model = 256, .n_heads = 3}>;
#endif
static_assert(zamba::parameter_count<Layer> > 0);
