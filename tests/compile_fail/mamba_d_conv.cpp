// SPDX-License-Identifier: MIT
// expect: zamba::MambaConfig: d_conv must be at least 2
// expect: detail::at_least<1, 2>
#include <zamba/blocks/mamba_block.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256, .d_conv = 2}>;
#else
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256, .d_conv = 1}>;
#endif
static_assert(zamba::parameter_count<Mixer> > 0);
