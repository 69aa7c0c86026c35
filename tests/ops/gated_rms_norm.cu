// SPDX-License-Identifier: MIT
#include <zamba/ops/gated_rms_norm.cuh>
#include <zamba/ops/rms_norm.cuh>

#include <array>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "gated_rms_norm.cpp"

namespace {

TEST_CASE("gated_rms_norm in bf16 is that in float, rounded where it is written") {
  const auto stored = [](Values values) {
    for (double& value : values) value = bf16(static_cast<float>(value));
    return values;
  };
  // Groups of pieces of 16 bytes and others; the last is wider than what a block holds in registers. With 2700
  // positions a block takes several in turn.
  for (const auto& [width, groups, padding] : {std::array<Index, 3>{8, 1, 0},
                                               {24, 3, 0},
                                               {24, 3, 8},
                                               {24, 3, 5},
                                               {36, 2, 0},
                                               {2056, 2, 0},
                                               {4104, 1, 8},
                                               {8200, 1, 0}}) {
    CAPTURE(width);
    CAPTURE(padding);
    const Index n = width == 24 ? 2700 : 3, D = width * groups;
    const Values x = stored(normal_values(n * D, 1)), z = stored(normal_values(n * D, 2)), weight = normal_values(D, 4);
    const Values d_out = stored(normal_values(n * D, 3));
    const Result exact = run<On<cpu, float>>(x, z, weight, d_out, n, groups);
    const Result got = run<On<cuda, bf16>>(x, z, weight, d_out, n, groups, 1e-5, padding);
    for (std::size_t i = 0; i < x.size(); ++i)  // half a unit in the last place of 8 bits, and float's own rounding
      REQUIRE(std::abs(got.out[i] - exact.out[i]) <= 0x1.01p-8 * std::abs(exact.out[i]));
    CHECK(relative_error(got.rstd, exact.rstd) < On<cuda, float>::tolerance);
    CHECK(relative_error(got.d_x, exact.d_x) < 0x1p-9);
    CHECK(relative_error(got.d_z, exact.d_z) < 0x1p-9);
    CHECK(relative_error(got.d_weight, exact.d_weight) < 4e-6);  // up to 2700 terms: their root times 2^-24
    CHECK(run<On<cuda, bf16>>(x, z, weight, d_out, n, groups, 1e-5, padding) == got);
  }
}

TEST_CASE("gated_rms_norm of no positions launches nothing") {
  Context<cuda> ctx;
  const PaddedMatrix<cuda, float> weight({1, 2}, 1);
  const Matrix<float> none(nullptr, 0, 2);
  gated_rms_norm(ctx, none, none, weight.vector(), 1e-5, none, Matrix<float>(nullptr, 0, 1));
  gated_rms_norm_backward(ctx, none, none, none, weight.vector(), Matrix<float>(nullptr, 0, 1), none, none,
                          weight.vector());
  ctx.synchronize();
}

}  // namespace
