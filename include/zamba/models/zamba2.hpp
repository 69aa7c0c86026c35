// SPDX-License-Identifier: MIT
// Zamba2 (arXiv 2411.15242) in its published sizes: Mamba-2 layers, one or two shared blocks in turn, and adapters of
// rank 128 for each use.
//
//   1.2B   one block; adapters on MLP, q, k and v; rope
//   2.7B   two blocks; adapters on the MLP
//   7B     two blocks; adapters on the MLP; rope
#pragma once

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

using Zamba2_1_2B =
    LanguageModel<32000, HybridStack<38, 6, Mamba2Block<Mamba2Config{.d_model = 2048, .d_state = 128, .n_heads = 64}>,
                                     SharedAttention<SharedAttentionConfig{.d_model = 2048,
                                                                           .n_heads = 32,
                                                                           .d_ff = 8192,
                                                                           .rope = true,
                                                                           .mlp_adapter_rank = 128,
                                                                           .qkv_adapter_rank = 128}>>>;

using Zamba2_2_7B =
    LanguageModel<32000, PatternStack<listed_pattern<54, 6, 12, 18, 24, 30, 36, 42, 47, 51>,
                                      Mamba2Block<Mamba2Config{.d_model = 2560, .d_state = 64, .n_heads = 80}>,
                                      SharedAttention<SharedAttentionConfig{
                                          .d_model = 2560, .n_heads = 32, .d_ff = 10240, .mlp_adapter_rank = 128}>,
                                      2>>;

using Zamba2_7B = LanguageModel<
    32000, PatternStack<listed_pattern<81, 6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77>,
                        Mamba2Block<Mamba2Config{.d_model = 3584, .d_state = 64, .n_heads = 112, .n_groups = 2}>,
                        SharedAttention<SharedAttentionConfig{
                            .d_model = 3584, .n_heads = 32, .d_ff = 14336, .rope = true, .mlp_adapter_rank = 128}>,
                        2>>;

static_assert(parameter_count<Zamba2_1_2B> == 1'215'064'704);
static_assert(parameter_count<Zamba2_2_7B> == 2'662'214'560);
static_assert(parameter_count<Zamba2_7B> == 7'356'749'648);

}  // namespace zamba
