// SPDX-License-Identifier: MIT
// Llama 2 (arXiv 2307.09288): transformer layers and a head of its own.
#pragma once

#include <zamba/blocks/transformer_block.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

using Llama2_7B =
    LanguageModel<32000,
                  UniformStack<32, TransformerBlock<TransformerConfig{.d_model = 4096, .n_heads = 32, .d_ff = 11008}>>,
                  Head::own>;

static_assert(parameter_count<Llama2_7B> == 6'738'415'616);

}  // namespace zamba
