// SPDX-License-Identifier: MIT
// Everything that runs on the CPU.
#pragma once

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/generate/generator.hpp>
#include <zamba/io/byte_tokenizer.hpp>
#include <zamba/io/huggingface.hpp>
#include <zamba/language_model.hpp>
#include <zamba/model.hpp>
#include <zamba/models/zamba_7b.hpp>
#include <zamba/pattern_stack.hpp>
#include <zamba/train/trainer.hpp>
