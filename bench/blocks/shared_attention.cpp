// SPDX-License-Identifier: MIT
// SharedAttention: d 512 (a small hybrid) over 1024 positions, and one token after 1024 at d 512 and at Zamba-7B's
// sizes.
#include <zamba/blocks/shared_attention.hpp>

#include "../support/block_run.hpp"

namespace {

using namespace zamba;
using namespace zamba::bench;

using Small = SharedUse<SharedAttention<SharedAttentionConfig{.d_model = 512, .n_heads = 8, .d_ff = 2048}>>;
using Zamba7BShared = SharedUse<SharedAttention<SharedAttentionConfig{.d_model = 3712, .n_heads = 16, .d_ff = 14848}>>;

BENCHMARK_TEMPLATE(forward_block, Small)
    ->Name("shared_attention/forward/d:512")
    ->ArgName("T")
    ->Arg(1024)
    ->UseRealTime();
BENCHMARK_TEMPLATE(train_block, Small)->Name("shared_attention/train/d:512")->ArgName("T")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Small)->Name("shared_attention/step/d:512")->ArgName("past")->Arg(1024)->UseRealTime();
BENCHMARK_TEMPLATE(step_block, Zamba7BShared)
    ->Name("shared_attention/step/d:3712")
    ->ArgName("past")
    ->Arg(1024)
    ->UseRealTime();

}  // namespace
