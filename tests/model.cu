// SPDX-License-Identifier: MIT
// Whole models on CUDA: what extend() promises, as on the CPU, and agreement with the CPU.
#include <zamba/zamba.cuh>

#include <doctest/doctest.h>

#include "support/extend_properties.hpp"

// Every member is instantiated.
template class zamba::Model<zamba_test::Hybrid, zamba::bf16, zamba::cuda>;

namespace {

using namespace zamba_test;

/// Sizes that are multiples of nothing, a head_dim of 26, a convolution of width 3.
using Odd = LanguageModel<
    vocabulary,
    HybridStack<4, 2,
                MambaBlock<MambaConfig{.d_model = 39, .d_state = 7, .d_conv = 3, .dt_rank = 5, .proj_bias = true}>,
                SharedAttention<SharedAttentionConfig{.d_model = 39, .n_heads = 3, .d_ff = 77}>>>;
/// Rows of whole 16 bytes, a head_dim of 464, a d_state of 128.
using Wide = LanguageModel<
    vocabulary,
    HybridStack<2, 2, MambaBlock<MambaConfig{.d_model = 464, .d_state = 128, .n_heads = 2}>,
                SharedAttention<SharedAttentionConfig{.d_model = 464, .n_heads = 2, .n_kv_heads = 1, .d_ff = 1024}>>>;

/// Zamba2: Mamba-2 layers in two groups, two shared blocks in turn with rope and adapters.
using Second = LanguageModel<
    vocabulary,
    PatternStack<"mhmhhm", Mamba2Block<Mamba2Config{.d_model = 24, .d_state = 40, .n_heads = 4, .n_groups = 2}>,
                 SharedAttention<SharedAttentionConfig{.d_model = 24,
                                                       .n_heads = 4,
                                                       .n_kv_heads = 2,
                                                       .d_ff = 40,
                                                       .rope = true,
                                                       .mlp_adapter_rank = 3,
                                                       .qkv_adapter_rank = 5}>,
                 2>>;

/// A prompt longer than what is computed at once, single tokens, a further chunk: |CUDA - exact| / |exact| for the
/// logits and the state of each, where exact is the CPU in double with the same weights.
template <class Net, class T>
void agrees(double bound) {
  const auto on_cpu = random_model<Net, T>().template to<double>();
  const auto on_gpu = random_model<Net, T, cuda>();
  constexpr Index longer = zamba::detail::prefill_chunk<cuda> + 188;
  auto there = on_gpu.new_state({.batch = 2, .max_length = longer + 50});
  auto here = on_cpu.new_state({.batch = 2, .max_length = longer + 50});
  for (const std::vector<Index>& lengths :
       {std::vector<Index>{longer, 3}, {1, 1}, {1, 0}, {0, 40}, {1, 1}, {1, 1}, {1, 1}}) {
    CAPTURE(lengths[0]);
    const auto tokens = random_tokens(lengths[0] + lengths[1]);
    const auto wanted = values(on_cpu.extend(here, {tokens, lengths}, Positions::all));
    const auto logits = values<cuda>(on_gpu.extend(there, {tokens, lengths}, Positions::all));
    CHECK(relative_error(logits, wanted) <= bound);
    CHECK(relative_error(values(there), values(here)) <= bound);
  }
}

}  // namespace

TEST_CASE("a model on CUDA agrees with the CPU: double") {
  agrees<Hybrid, double>(1e-12);
  agrees<Odd, double>(1e-12);
  agrees<Second, double>(1e-12);
  agrees<Transformer, double>(1e-12);
}
// Products of up to 928 terms, each within 1e-6; random weights this large amplify what enters a layer.
TEST_CASE("a model on CUDA agrees with the CPU: float") {
  agrees<Hybrid, float>(1e-4);
  agrees<Odd, float>(1e-4);
  agrees<Wide, float>(1e-4);
  agrees<Second, float>(1e-4);
  agrees<Transformer, float>(1e-4);
}
// Activations are rounded to 2^-9 some forty times on the way to a logit.
TEST_CASE("a model on CUDA agrees with the CPU: bfloat16") {
  agrees<Hybrid, bf16>(40 * 0x1p-9);
  agrees<Wide, bf16>(40 * 0x1p-9);
}

TEST_CASE("extend() on CUDA: float") { check_extend<Hybrid, float, cuda>(); }
TEST_CASE("extend() on CUDA: double") { check_extend<TwoCopies, double, cuda>(); }
TEST_CASE("extend() on CUDA: nested stacks") { check_extend<Nested, float, cuda>(); }
TEST_CASE("extend() on CUDA: Zamba2") { check_extend<Second, float, cuda>(); }
TEST_CASE("extend() on CUDA: Mamba layers only") { check_extend<Plain, float, cuda>(); }
