// SPDX-License-Identifier: MIT
// MambaBlock: d 512 (a small hybrid) over 1024 positions, and one token at d 512 and at Zamba-7B's sizes.
#include <zamba/blocks/mamba_block.hpp>

#include "../support/block_run.hpp"

namespace {

using namespace zamba;
using namespace zamba::bench;

using Small = MambaBlock<MambaConfig{.d_model = 512, .n_heads = 2}>;
using Zamba7BMixer = MambaBlock<MambaConfig{.d_model = 3712, .n_heads = 2}>;

BENCHMARK_TEMPLATE(forward_block, Small)->Name("mamba_block/forward/d:512")->ArgName("T")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(train_block, Small)->Name("mamba_block/train/d:512")->ArgName("T")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Small)->Name("mamba_block/step/d:512")->ArgName("past")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Zamba7BMixer)
    ->Name("mamba_block/step/d:3712")
    ->ArgName("past")
    ->Arg(1024)
    ->UseRealTime();

}  // namespace
