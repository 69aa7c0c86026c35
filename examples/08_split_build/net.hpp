// SPDX-License-Identifier: MIT
// The model that both halves of the program mean.
#pragma once

#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64, .d_state = 16, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4}>;
using Net = zamba::LanguageModel<256, zamba::HybridStack<6, 3, Mixer, Shared>>;
