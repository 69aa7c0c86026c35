// SPDX-License-Identifier: MIT
// Mamba2Block: d 512 (a small hybrid) over 1024 positions, and one token at d 512 and at Zamba2-2.7B's sizes.
#include <zamba/blocks/mamba2_block.hpp>

#include "../support/block_run.hpp"

namespace {

using namespace zamba;
using namespace zamba::bench;

using Small = Mamba2Block<Mamba2Config{.d_model = 512, .d_state = 64, .n_heads = 16}>;
using Zamba2Mixer = Mamba2Block<Mamba2Config{.d_model = 2560, .d_state = 64, .n_heads = 80}>;

BENCHMARK_TEMPLATE(forward_block, Small)->Name("mamba2_block/forward/d:512")->ArgName("T")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(train_block, Small)->Name("mamba2_block/train/d:512")->ArgName("T")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Small)->Name("mamba2_block/step/d:512")->ArgName("past")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Zamba2Mixer)
    ->Name("mamba2_block/step/d:2560")
    ->ArgName("past")
    ->Arg(1024)
    ->UseRealTime();

}  // namespace
