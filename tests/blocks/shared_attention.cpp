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
/// Keys are cached as they were turned, and their gradients turned back.
using Turned = SharedAttention<SharedAttentionConfig{.d_model = 8, .n_heads = 2, .d_ff = 12, .rope = true}>;
/// Adapters of both kinds with ranks of their own, rope over heads of 6, of which fewer for keys.
using Adapted = SharedAttention<SharedAttentionConfig{.d_model = 12,
                                                      .n_heads = 4,
                                                      .n_kv_heads = 2,
                                                      .d_ff = 11,
                                                      .rope = true,
                                                      .rope_theta = 500,
                                                      .mlp_adapter_rank = 3,
                                                      .qkv_adapter_rank = 5,
                                                      .context_stretch = 8}>;
using MlpAdapted =
    SharedAttention<SharedAttentionConfig{.d_model = 8, .n_heads = 2, .d_ff = 12, .mlp_adapter_rank = 1}>;

}  // namespace

TEST_SUITE("shared_attention") {
  TEST_CASE("conformance") {
    const auto report = testing::conformance<Adapted>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.lines().size() > 15);
  }
  TEST_CASE_TEMPLATE("conformance of other sizes", B, Full, Grouped, Turned, MlpAdapted) {
    const auto report = testing::conformance<B, testing::Passes::float64_alone>();
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
    CHECK(parameter_count<SharedUse<Grouped>> == parameter_count<Grouped>);
    // Adapters of rank 5 from 24 to 24, 12 and 12, one of rank 3 from 12 to 22.
    CHECK(parameter_count<SharedUse<Adapted>> - parameter_count<Adapted> ==
          5 * (3 * 24 + 24 + 12 + 12) + 3 * (12 + 22));
    CHECK(active_parameter_count<SharedUse<Adapted>> == parameter_count<SharedUse<Adapted>>);
    CHECK(state_bytes<Adapted, float>(1, 10) == state_bytes<SharedUse<Adapted>, float>(1, 10));
  }

  TEST_CASE("a template argument is read as it was given") {  // clang 14 misreads some, see SharedAttentionConfig
    const auto norm_eps = []<SharedAttentionConfig C>(SharedAttention<C>) { return C.norm_eps; };
    const auto stretch = []<SharedAttentionConfig C>(SharedAttention<C>) { return C.context_stretch; };
    CHECK(norm_eps(Full()) == 1e-5);
    CHECK(norm_eps(Adapted()) == 1e-5);
    CHECK(stretch(Full()) == 1);
    CHECK(stretch(Adapted()) == 8);
  }

  TEST_CASE("a long context stretches theta") {
    CHECK(SharedAttentionConfig{.d_model = 8, .rope_theta = 500}.theta() == 500);
    CHECK(Adapted::config.theta() == doctest::Approx(500 * std::pow(8.0, 1.5)));  // 6 / (6 - 2)
  }
}
