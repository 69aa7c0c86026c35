// SPDX-License-Identifier: MIT
// What the tested programs have compiled in. Without doctest, which the programs do not have.
#pragma once

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/checkpoints/registry.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba_test {

/// The reference case `zamba`, whose vocabulary holds the bytes below 96.
using CapitalsNet = zamba::LanguageModel<
    96,
    zamba::PatternStack<"mmhmmmmhm", zamba::MambaBlock<zamba::MambaConfig{.d_model = 32, .d_state = 16, .n_heads = 2}>,
                        zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 32, .n_heads = 4, .d_ff = 64}>>>;

/// All bytes.
using ByteNet = zamba::LanguageModel<
    256, zamba::PatternStack<"mmhm", zamba::MambaBlock<zamba::MambaConfig{.d_model = 32, .d_state = 8, .n_heads = 2}>,
                             zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 32, .n_heads = 4}>>>;

/// Defined where nvcc compiles small_models.cu.
void add_cuda_models(zamba::Registry& registry);

}  // namespace zamba_test
