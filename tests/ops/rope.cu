// SPDX-License-Identifier: MIT
#include <zamba/ops/rope.cuh>

#include <array>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "rope.cpp"

namespace {

TEST_CASE("rope in bf16 is that in float, rounded where it is written") {
  // Halves of pieces of 16 bytes and others; strides that pieces fit, and one that they do not.
  for (const auto& [head_dim, heads, padding] :
       {std::array<Index, 3>{16, 3, 0}, {16, 3, 8}, {16, 3, 5}, {64, 2, 0}, {368, 1, 0}, {24, 2, 0}}) {
    CAPTURE(head_dim);
    CAPTURE(padding);
    const RopeShape shape{heads, head_dim, 10000};
    const std::vector<Index> offsets{0, 3, 3, 7}, starts{0, 5, 100000};
    Values x = normal_values(7 * heads * head_dim, 1);
    for (double& value : x) value = bf16(static_cast<float>(value));
    const Values exact = run<On<cpu, float>>(x, shape, offsets, starts);
    const Values got = run<On<cuda, bf16>>(x, shape, offsets, starts, false, padding);
    for (std::size_t i = 0; i < x.size(); ++i)  // half a unit of 8 bits, and float's rounding of values up to 8
      REQUIRE(std::abs(got[i] - exact[i]) <= 0x1p-8 * std::abs(exact[i]) + 1e-6);
  }
}

TEST_CASE("rope of no tokens launches nothing") {
  Context<cuda> ctx;
  rope(ctx, RopeShape{1, 4, 10000}, Sequences{}, Matrix<float>(nullptr, 0, 4));
  ctx.synchronize();
}

}  // namespace
