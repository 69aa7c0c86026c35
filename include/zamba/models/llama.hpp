// SPDX-License-Identifier: MIT
// Llama 2 (arXiv 2307.09288) and Llama 3 (arXiv 2407.21783), TinyLlama (arXiv 2401.02385), and Mistral 7B (arXiv
// 2310.06825) since v0.2, which has no sliding window: transformer layers and a head of its own.
#pragma once

#include <zamba/blocks/transformer_block.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

/// Layer is a type, not its config: nvcc 13.0 loses an alias's argument of class type.
template <Index Vocabulary, Index Layers, class Layer>
using PublishedTransformer = LanguageModel<Vocabulary, UniformStack<Layers, Layer>, Head::own>;

}  // namespace detail

using Llama2_7B =
    detail::PublishedTransformer<32000, 32,
                                 TransformerBlock<TransformerConfig{.d_model = 4096, .n_heads = 32, .d_ff = 11008}>>;

using Llama3_8B = detail::PublishedTransformer<
    128256, 32,
    TransformerBlock<TransformerConfig{
        .d_model = 4096, .n_heads = 32, .n_kv_heads = 8, .d_ff = 14336, .rope_theta = 500000}>>;

using TinyLlama_1_1B = detail::PublishedTransformer<
    32000, 22, TransformerBlock<TransformerConfig{.d_model = 2048, .n_heads = 32, .n_kv_heads = 4, .d_ff = 5632}>>;

using Mistral_7B_v0_3 = detail::PublishedTransformer<
    32768, 32,
    TransformerBlock<TransformerConfig{
        .d_model = 4096, .n_heads = 32, .n_kv_heads = 8, .d_ff = 14336, .rope_theta = 1000000}>>;

static_assert(parameter_count<Llama2_7B> == 6'738'415'616);
static_assert(parameter_count<Llama3_8B> == 8'030'261'248);
static_assert(parameter_count<TinyLlama_1_1B> == 1'100'048'384);
static_assert(parameter_count<Mistral_7B_v0_3> == 7'248'023'552);

}  // namespace zamba
