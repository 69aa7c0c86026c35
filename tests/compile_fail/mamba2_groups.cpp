// SPDX-License-Identifier: MIT
// expect: zamba::Mamba2Config: n_heads must be a multiple of n_groups
// expect: detail::divides<8, 3>
#include <zamba/blocks/mamba2_block.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = zamba::Mamba2Block<zamba::Mamba2Config{.d_model = 192, .n_heads = 6, .n_groups = 3}>;
#else
using Mixer = zamba::Mamba2Block<zamba::Mamba2Config{.d_model = 192, .n_heads = 8, .n_groups = 3}>;
#endif
static_assert(zamba::parameter_count<Mixer> > 0);
