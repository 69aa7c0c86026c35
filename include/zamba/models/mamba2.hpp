// SPDX-License-Identifier: MIT
// The published Mamba-2 models (arXiv 2405.21060): heads of 64 channels in one group, a state of 128, a tied head, the
// vocabulary padded to 50288. Mamba-Codestral-7B-v0.1 is one of eight groups, with a head of its own.
#pragma once

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

template <Index Layers, Index D>
using PublishedMamba2 = LanguageModel<50288, UniformStack<Layers, Mamba2Block<Mamba2Config{.d_model = D}>>>;

}  // namespace detail

using Mamba2_130M = detail::PublishedMamba2<24, 768>;
using Mamba2_370M = detail::PublishedMamba2<48, 1024>;
using Mamba2_790M = detail::PublishedMamba2<48, 1536>;
using Mamba2_1_4B = detail::PublishedMamba2<48, 2048>;
using Mamba2_2_8B = detail::PublishedMamba2<64, 2560>;

using MambaCodestral_7B =
    LanguageModel<32768, UniformStack<64, Mamba2Block<Mamba2Config{.d_model = 4096, .n_groups = 8}>>, Head::own>;

static_assert(parameter_count<Mamba2_130M> == 128'989'632);
static_assert(parameter_count<Mamba2_370M> == 368'346'624);
static_assert(parameter_count<Mamba2_790M> == 780'161'280);
static_assert(parameter_count<Mamba2_1_4B> == 1'343'757'312);
static_assert(parameter_count<Mamba2_2_8B> == 2'702'599'680);
static_assert(parameter_count<MambaCodestral_7B> == 7'285'403'648);

}  // namespace zamba
