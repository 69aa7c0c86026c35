// SPDX-License-Identifier: MIT
// expect: zamba::MambaConfig: expand * d_model must be a multiple of n_heads
// expect: detail::divides<512, 3>
#include <zamba/blocks/mamba_block.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256, .n_heads = 2}>;
#else
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256, .n_heads = 3}>;
#endif
static_assert(zamba::parameter_count<Mixer> > 0);
