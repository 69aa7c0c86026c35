// SPDX-License-Identifier: MIT
// expect: zamba::AdamW: weights that are no plain numbers are not trained
#include <zamba/train/adamw.hpp>

#include "../support/scaled.hpp"
#include "block_parts.hpp"

#ifndef ZAMBA_EXPECT_FAILURE
using Weights = zamba::bf16;
#else
using Weights = zamba_test::Scaled<signed char>;
#endif
using Net = zamba::LanguageModel<256, zamba::UniformStack<2, parts::Layer>>;
using Optimiser = zamba::AdamW<Net, zamba::Types<Weights, float>, zamba::cpu>;

zamba::Index steps(const Optimiser& optimiser) { return optimiser.steps(); }
