// SPDX-License-Identifier: MIT
// Zamba-7B-v1 (arXiv 2405.16712): 76 Mamba layers of two heads, one shared block used by thirteen of them.
#pragma once

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

using Zamba7B = LanguageModel<
    32000, PatternStack<zamba_pattern<76, 6, 4>, MambaBlock<MambaConfig{.d_model = 3712, .d_state = 16, .n_heads = 2}>,
                        SharedAttention<SharedAttentionConfig{.d_model = 3712, .n_heads = 16, .d_ff = 14848}>>>;

static_assert(parameter_count<Zamba7B> == 7'232'490'496);

}  // namespace zamba
