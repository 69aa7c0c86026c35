// SPDX-License-Identifier: MIT
// SharedAttention: d 512 (a small hybrid) over 1024 positions, and one token after 1024 at d 512, at Zamba-7B's sizes
// and, with rope and adapters, at those of Zamba2-1.2B.
#include <zamba/blocks/shared_attention.hpp>

#include "../support/block_run.hpp"

namespace {

using namespace zamba;
using namespace zamba::bench;

using Small = SharedUse<SharedAttention<SharedAttentionConfig{.d_model = 512, .n_heads = 8, .d_ff = 2048}>>;
using Zamba7BShared = SharedUse<SharedAttention<SharedAttentionConfig{.d_model = 3712, .n_heads = 16, .d_ff = 14848}>>;
using Zamba2Shared = SharedUse<SharedAttention<SharedAttentionConfig{
    .d_model = 2048, .n_heads = 32, .d_ff = 8192, .rope = true, .mlp_adapter_rank = 128, .qkv_adapter_rank = 128}>>;

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
BENCHMARK_TEMPLATE(step_block, Zamba2Shared)
    ->Name("shared_attention/step/d:2048")
    ->ArgName("past")
    ->Arg(1024)
    ->UseRealTime();

}  // namespace
