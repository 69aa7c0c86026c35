// SPDX-License-Identifier: MIT
// expect: zamba::Model: T is double, float, bf16, or Types<W, A, C>: with activations A of float or double on the CPU
#include <zamba/model.hpp>

#include "block_parts.hpp"

#ifndef ZAMBA_EXPECT_FAILURE
using Types = zamba::Types<zamba::bf16, float>;
#else
using Types = zamba::Types<float, zamba::bf16>;
#endif
using Net = zamba::LanguageModel<256, zamba::UniformStack<2, parts::Layer>>;
static_assert(zamba::Model<Net, Types>::vocabulary() == 256);
