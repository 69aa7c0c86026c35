// SPDX-License-Identifier: MIT
#include <zamba/blocks/mamba_block.hpp>

#include <doctest/doctest.h>

#include <zamba/testing/conformance.hpp>

using namespace zamba;

namespace {

/// Two heads, as Zamba-7B has.
using TwoHeads = MambaBlock<MambaConfig{.d_model = 12, .d_state = 4, .n_heads = 2}>;
/// OddMamba sizes everywhere, all biases, the shortest convolution: heads of 7 channels fill no register.
using OddMamba = MambaBlock<MambaConfig{
    .d_model = 7, .d_state = 3, .d_conv = 2, .expand = 3, .dt_rank = 5, .n_heads = 3, .proj_bias = true}>;
/// One head, no bias at all.
using BareMamba = MambaBlock<MambaConfig{.d_model = 9, .d_state = 1, .expand = 1, .conv_bias = false}>;

}  // namespace

TEST_SUITE("mamba_block") {
  TEST_CASE("conformance") {
    const auto report = testing::conformance<TwoHeads>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }
  TEST_CASE_TEMPLATE("conformance of other sizes", B, OddMamba, BareMamba) {
    const auto report = testing::conformance<B, testing::Passes::float64_alone>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }

  TEST_CASE("sizes") {
    CHECK(MambaConfig{.d_model = 3712, .n_heads = 2}.rank() == 232);
    CHECK(MambaConfig{.d_model = 3712, .n_heads = 2}.head_dim() == 3712);
    CHECK(MambaConfig{.d_model = 17}.rank() == 2);
    // norm 7, in_proj 42 * 7 + 42, conv 21 * 2 + 21, x_proj 3 * 11 * 7, dt_proj 21 * 5 + 21, A_log 63, D 21,
    // out_proj 7 * 21 + 7
    CHECK(parameter_count<OddMamba> == 7 + 336 + 63 + 231 + 126 + 63 + 21 + 154);
    CHECK(state_bytes<OddMamba, float>(2, 100) == 2 * (1 + 3) * 21 * 4);
  }
}
