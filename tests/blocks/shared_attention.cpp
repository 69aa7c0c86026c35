// SPDX-License-Identifier: MIT
#include <zamba/blocks/shared_attention.hpp>

#include <doctest/doctest.h>

#include <zamba/testing/conformance.hpp>

using namespace zamba;

namespace {

using Full = SharedAttention<SharedAttentionConfig{.d_model = 8, .n_heads = 2, .d_ff = 12}>;
/// Four query heads on two key heads, odd sizes, a scale of its own.
using Grouped = SharedAttention<SharedAttentionConfig{
    .d_model = 14, .n_heads = 4, .n_kv_heads = 2, .d_ff = 11, .softmax_scale = 0.7}>;

}  // namespace

TEST_SUITE("shared_attention") {
  TEST_CASE_TEMPLATE("conformance", B, Full, Grouped) {
    const auto report = testing::conformance<B>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }

  TEST_CASE("sizes") {
    CHECK(SharedAttentionConfig{.d_model = 3712, .n_heads = 16}.head_dim() == 464);
    CHECK(SharedAttentionConfig{.d_model = 8}.ff() == 32);
    CHECK(SharedAttentionConfig{.d_model = 8, .n_heads = 4}.kv_heads() == 4);
    // norm 28, q 28 * 28, k and v 14 * 28 each, o 14 * 28, norm 14, three matrices of 11 * 14
    CHECK(parameter_count<Grouped> == 28 + 784 + 2 * 392 + 392 + 14 + 3 * 154);
    CHECK(state_bytes<Grouped, bf16>(2, 100) == 2 * 100 * 2 * 14 * 2);
  }
}
