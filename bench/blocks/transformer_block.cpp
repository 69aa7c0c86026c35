// SPDX-License-Identifier: MIT
// TransformerBlock: d 512 over 1024 positions, and one token after 1024 at d 512 and at Llama-2-7B's sizes.
#include <zamba/blocks/transformer_block.hpp>

#include "../support/block_run.hpp"

namespace {

using namespace zamba;
using namespace zamba::bench;

using Small = TransformerBlock<TransformerConfig{.d_model = 512, .n_heads = 8, .d_ff = 1408}>;
using Llama2Layer = TransformerBlock<TransformerConfig{.d_model = 4096, .n_heads = 32, .d_ff = 11008}>;

BENCHMARK_TEMPLATE(forward_block, Small)
    ->Name("transformer_block/forward/d:512")
    ->ArgName("T")
    ->Arg(1024)
    ->UseRealTime();
BENCHMARK_TEMPLATE(train_block, Small)->Name("transformer_block/train/d:512")->ArgName("T")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Small)->Name("transformer_block/step/d:512")->ArgName("past")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Llama2Layer)
    ->Name("transformer_block/step/d:4096")
    ->ArgName("past")
    ->Arg(1024)
    ->UseRealTime();

}  // namespace
