// SPDX-License-Identifier: MIT
// Everything that runs on the CPU.
#pragma once

#include <zamba/any_model.hpp>
#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/blocks/transformer_block.hpp>
#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/registry.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>
#include <zamba/eval/multiple_choice.hpp>
#include <zamba/eval/perplexity.hpp>
#include <zamba/generate/generator.hpp>
#include <zamba/generate/speculative.hpp>
#include <zamba/language_model.hpp>
#include <zamba/model.hpp>
#include <zamba/models/llama.hpp>
#include <zamba/models/mamba.hpp>
#include <zamba/models/mamba2.hpp>
#include <zamba/models/zamba2.hpp>
#include <zamba/models/zamba_7b.hpp>
#include <zamba/pattern_stack.hpp>
#include <zamba/text/byte_tokenizer.hpp>
#include <zamba/text/text_stream.hpp>
#include <zamba/train/trainer.hpp>
