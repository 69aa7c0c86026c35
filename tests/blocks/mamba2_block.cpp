// SPDX-License-Identifier: MIT
#include <zamba/blocks/mamba2_block.hpp>

#include <doctest/doctest.h>

#include <zamba/testing/conformance.hpp>

#include <tests/support/extend_properties.hpp>

using namespace zamba;

namespace {

/// One group, as the published Mamba-2 models and the small Zamba2 have.
using OneGroup = Mamba2Block<Mamba2Config{.d_model = 12, .d_state = 5, .n_heads = 4}>;
/// B, C and the norm in groups, as Zamba2-7B has; eps large, so that a gradient without it would show.
using TwoGroups = Mamba2Block<Mamba2Config{.d_model = 8, .d_state = 4, .n_heads = 4, .n_groups = 2, .norm_eps = 0.1}>;
/// Groups of heads, but a norm over all channels; a limit on dt that about a half of the heads meets.
using WideNorm =
    Mamba2Block<Mamba2Config{.d_model = 8, .d_state = 3, .n_heads = 4, .n_groups = 2, .norm_groups = 1, .dt_min = 0.7}>;
/// Odd sizes everywhere, all biases, the shortest convolution: heads of 7 channels fill no register.
using Odd = Mamba2Block<Mamba2Config{.d_model = 7,
                                     .d_state = 3,
                                     .d_conv = 2,
                                     .expand = 3,
                                     .n_heads = 3,
                                     .n_groups = 3,
                                     .proj_bias = true,
                                     .gated_norm_eps = 0.2}>;
/// One head, no bias at all.
using Bare = Mamba2Block<Mamba2Config{.d_model = 9, .d_state = 1, .expand = 1, .n_heads = 1, .conv_bias = false}>;

}  // namespace

TEST_SUITE("mamba2_block") {
  TEST_CASE("conformance") {
    const auto report = testing::conformance<TwoGroups>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }
  TEST_CASE_TEMPLATE("conformance of other sizes", B, OneGroup, WideNorm, Odd, Bare) {
    const auto report = testing::conformance<B, testing::Passes::float64_alone>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }

  TEST_CASE("extend: Mamba-2 layers with a shared block, in float") {
    zamba_test::check_extend<zamba_test::Hybrid2, float>();
  }

  TEST_CASE("sizes") {
    CHECK(Mamba2Config{.d_model = 2048}.heads() == 64);
    CHECK(Mamba2Config{.d_model = 2560, .n_heads = 80}.head_dim() == 64);
    CHECK(Mamba2Config{.d_model = 64, .n_groups = 2}.gated_norm_groups() == 2);
    // D 21, of the convolution 21 + 2 * 3 * 3 = 39, of in_proj 21 + 39 + 3 = 63:
    // norm 7, in_proj 63 * 7 + 63, conv 39 * 2 + 39, dt_bias, A_log and D 3 each, norm 21, out_proj 7 * 21 + 7
    CHECK(parameter_count<Odd> == 7 + 504 + 117 + 9 + 21 + 154);
    CHECK(state_bytes<Odd, float>(2, 100) == 2 * (39 + 3 * 21) * 4);
  }
}
