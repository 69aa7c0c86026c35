// SPDX-License-Identifier: MIT
// expect: zamba::CheckpointFormat: files of model_type mamba2 have a gated norm over the n_groups groups
// expect: detail::equal<1, 2>
#include <zamba/checkpoints/mamba.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = zamba::Mamba2Block<zamba::Mamba2Config{.d_model = 64, .n_groups = 2}>;
#else
using Mixer = zamba::Mamba2Block<zamba::Mamba2Config{.d_model = 64, .n_groups = 2, .norm_groups = 1}>;
#endif
static_assert(sizeof(zamba::CheckpointFormat<zamba::LanguageModel<96, zamba::UniformStack<2, Mixer>>>) > 0);
