// SPDX-License-Identifier: MIT
#include <zamba/blocks/transformer_block.hpp>

#include <doctest/doctest.h>

#include <zamba/testing/conformance.hpp>

#include <tests/support/extend_properties.hpp>

using namespace zamba;

namespace {

using FullTransformer = TransformerBlock<TransformerConfig{.d_model = 12, .n_heads = 3, .d_ff = 10}>;
/// Four query heads on two key heads, odd sizes, angles that turn fast, eps large so that a gradient without it would
/// show.
using GroupedTransformer = TransformerBlock<TransformerConfig{
    .d_model = 24, .n_heads = 4, .n_kv_heads = 2, .d_ff = 11, .rope_theta = 7, .norm_eps = 0.2}>;
/// The smallest head that rope can turn.
using PairTransformer = TransformerBlock<TransformerConfig{.d_model = 6, .n_heads = 3, .n_kv_heads = 1}>;

}  // namespace

TEST_SUITE("transformer_block") {
  TEST_CASE("conformance") {
    const auto report = testing::conformance<GroupedTransformer>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }
  TEST_CASE_TEMPLATE("conformance of other sizes", B, FullTransformer, PairTransformer) {
    const auto report = testing::conformance<B, testing::Passes::float64_alone>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }

  TEST_CASE("extend: transformer layers stored in bf16, a head of its own") {
    zamba_test::check_extend<zamba_test::Transformer, bf16>();
  }
  TEST_CASE("extend: stacks of transformer layers with a shared block") {
    zamba_test::check_extend<zamba_test::NestedTransformer, double>();
  }

  TEST_CASE("sizes") {
    CHECK(TransformerConfig{.d_model = 4096, .n_heads = 32}.head_dim() == 128);
    CHECK(TransformerConfig{.d_model = 8}.ff() == 32);
    CHECK(TransformerConfig{.d_model = 8, .n_heads = 4}.kv_heads() == 4);
    // norms 24 each, q and o 24 * 24, k and v 12 * 24, three matrices of 11 * 24
    CHECK(parameter_count<GroupedTransformer> == 2 * 24 + 2 * 576 + 2 * 288 + 3 * 264);
    CHECK(state_bytes<GroupedTransformer, bf16>(2, 100) == 2 * 100 * 2 * 12 * 2);
  }
}
