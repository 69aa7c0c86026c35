// SPDX-License-Identifier: MIT
// expect: zamba: NaN and infinity must be told from numbers: add -fno-finite-math-only after -ffast-math or -Ofast
// good flags: -Ofast -fno-finite-math-only
// bad flags: -ffast-math
#include <zamba/blocks/mamba_block.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256}>;
static_assert(zamba::parameter_count<Mixer> > 0);
