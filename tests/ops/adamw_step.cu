// SPDX-License-Identifier: MIT
#include <zamba/ops/adamw_step.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "adamw_step.cpp"

namespace {

TEST_CASE("sum_of_squares: more pieces than the last block has threads") {
  // 1,500 pieces, the last of 5 elements.
  const Index n = (1'499 << 14) + 5;
  Context<cuda> ctx;
  const Copy<cuda, float> values(std::vector<float>(static_cast<std::size_t>(n), 0.5f));
  const Copy<cuda, double> sum(std::vector<double>{-1});
  sum_of_squares(ctx, values.view(), sum.view().data);
  std::vector<double> result(1);
  sum.take(result);
  CHECK(result[0] == 0.25 * static_cast<double>(n));  // which is exact in any order
}

}  // namespace
