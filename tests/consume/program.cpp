// SPDX-License-Identifier: MIT
// The least a user writes: works with what it computes with, and shows that the dependencies are found.
#include <cstdio>

#include <Eigen/Core>
#include <nlohmann/json.hpp>
#include <zamba/context.hpp>

int main() {
  zamba::Context<zamba::cpu> context;
  auto row = context.arena().tensor<float>(zamba::Index{4});
  context.parallel_for(4, [&](zamba::Index i, int) { row[i] = static_cast<float>(i); });
  const float sum = Eigen::Map<Eigen::VectorXf>(row.data, 4).sum();
  std::printf("%s\n", nlohmann::json{{"threads", context.threads()}, {"sum", sum}}.dump().c_str());
  return sum == 6 ? 0 : 1;
}
