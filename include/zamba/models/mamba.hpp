// SPDX-License-Identifier: MIT
// The published Mamba models (arXiv 2312.00752): Mamba layers, a tied head, the vocabulary padded to 50280.
#pragma once

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

template <Index Layers, Index D>
using PublishedMamba = LanguageModel<50280, UniformStack<Layers, MambaBlock<MambaConfig{.d_model = D}>>>;

}  // namespace detail

using Mamba_130M = detail::PublishedMamba<24, 768>;
using Mamba_370M = detail::PublishedMamba<48, 1024>;
using Mamba_790M = detail::PublishedMamba<48, 1536>;
using Mamba_1_4B = detail::PublishedMamba<48, 2048>;
using Mamba_2_8B = detail::PublishedMamba<64, 2560>;

static_assert(parameter_count<Mamba_130M> == 129'135'360);
static_assert(parameter_count<Mamba_370M> == 371'516'416);
static_assert(parameter_count<Mamba_790M> == 793'204'224);
static_assert(parameter_count<Mamba_1_4B> == 1'372'178'432);
static_assert(parameter_count<Mamba_2_8B> == 2'768'345'600);

}  // namespace zamba
