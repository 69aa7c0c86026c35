// SPDX-License-Identifier: MIT
// cross_entropy: one product for the loss, three for loss and gradients, and a softmax over the vocabulary.
#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/cross_entropy.hpp>
#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

using namespace zamba;

namespace {

void cross_entropy_loss(benchmark::State& state) {
  const Index n = state.range(0), d = state.range(1), vocabulary = state.range(2);
  const bool backward = state.range(3);
  Context<cpu> ctx;
  Random random(Seed{1});
  std::vector<float> h(static_cast<std::size_t>(n * d)), head(static_cast<std::size_t>(vocabulary * d));
  std::vector<float> d_h(h.size()), d_head(head.size());
  for (auto& v : h) v = static_cast<float>(random.normal());
  for (auto& v : head) v = static_cast<float>(random.normal() / std::sqrt(static_cast<double>(d)));
  std::vector<Token> targets(static_cast<std::size_t>(n), -1);
  for (Index t = 0; t < 3; ++t)
    targets[static_cast<std::size_t>(t * (n - 1) / 2)] = static_cast<Token>(random.below(vocabulary));
  const Matrix<float> x(h.data(), n, d), w(head.data(), vocabulary, d);
  const Matrix<float> d_x(d_h.data(), n, d), d_w(d_head.data(), vocabulary, d);
  const auto run = [&] {
    return backward ? cross_entropy_backward(ctx, x, w, targets.data(), 1.0 / static_cast<double>(n), d_x, d_w)
                    : cross_entropy(ctx, x, w, targets.data());
  };
  double wanted = 0;
  for (Index t = 0; t < 3; ++t) {  // three positions by the plain loop
    const Index row = t * (n - 1) / 2;
    double sum = 0, at_target = 0;
    for (Index v = 0; v < vocabulary; ++v) {
      double logit = 0;
      for (Index k = 0; k < d; ++k) logit += static_cast<double>(x(row, k)) * static_cast<double>(w(v, k));
      sum += std::exp(logit);
      if (v == targets[static_cast<std::size_t>(row)]) at_target = logit;
    }
    wanted += std::log(sum) - at_target;
  }
  if (std::abs(run().sum - wanted) > 1e-5 * wanted) state.SkipWithError("cross_entropy differs from the plain loop");
  for (auto& target : targets) target = static_cast<Token>(random.below(vocabulary));
  for (auto _ : state) {
    benchmark::DoNotOptimize(run());
    benchmark::ClobberMemory();
  }
  const double product = 2.0 * static_cast<double>(n) * static_cast<double>(d) * static_cast<double>(vocabulary);
  bench::report(state, (backward ? 3 : 1) * product, static_cast<double>(head.size() * sizeof(float)), ctx.threads());
}

}  // namespace

// A hybrid of d 512 with bytes, and with the published vocabulary.
BENCHMARK(cross_entropy_loss)
    ->ArgNames({"tokens", "d", "vocabulary", "backward"})
    ->ArgsProduct({{1024}, {512}, {256, 32000}, {0, 1}})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
