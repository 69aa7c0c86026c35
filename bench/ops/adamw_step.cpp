// SPDX-License-Identifier: MIT
// adamw_step and sum_of_squares: bound by memory. A step reads and writes weight and both moments and reads the
// gradient, 28 bytes an element in float, and in bf16 with the lower halves of masters.
#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/adamw_step.hpp>

#include "../support/ceilings.hpp"

using namespace zamba;

namespace {

constexpr AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1};

template <class W>
void adamw(benchmark::State& state) {
  const Index n = state.range(0);
  const auto size = static_cast<std::size_t>(n);
  Context<cpu> ctx;
  std::vector<W> weight(size, W(0.5f));
  std::vector<float> gradient(size, 0.25f), m(size), v(size);
  constexpr bool split = !std::is_same_v<W, float>;
  std::vector<std::uint16_t> low(split ? size : 0);
  const AdamWTensors<W, float> tensors{
      {weight.data(), n}, {low.data(), std::ssize(low)}, {gradient.data(), n}, {m.data(), n}, {v.data(), n}};
  const double norm_squared = 0.25 * 0.25;
  adamw_step(ctx, tensors, scalars, &norm_squared);
  // The first step moves by the learning rate, whatever the gradient, after the decay.
  const double wanted = 0.5 * (1 - 1e-4) - 1e-3, got = static_cast<float>(weight[size / 2]);
  if (std::abs(got - wanted) > (split ? 2e-3 : 1e-6)) state.SkipWithError("adamw_step differs from its definition");
  for (auto _ : state) {
    adamw_step(ctx, tensors, scalars, &norm_squared);
    benchmark::ClobberMemory();
  }
  bench::report(state, 15.0 * static_cast<double>(n), 28.0 * static_cast<double>(n), ctx.threads());
}

void squares(benchmark::State& state) {
  const Index n = state.range(0);
  Context<cpu> ctx;
  const std::vector<float> values(static_cast<std::size_t>(n), 0.5f);
  double sum = 0;
  sum_of_squares(ctx, Vector<const float>(values.data(), n), &sum);
  if (std::abs(sum - 0.25 * static_cast<double>(n)) > 1e-9 * sum) state.SkipWithError("sum_of_squares is wrong");
  for (auto _ : state) {
    sum_of_squares(ctx, Vector<const float>(values.data(), n), &sum);
    benchmark::ClobberMemory();
  }
  bench::report(state, 2.0 * static_cast<double>(n), sizeof(float) * static_cast<double>(n), ctx.threads());
}

}  // namespace

// One norm's weight of Zamba-7B, in_proj of a hybrid of d 512, and one of the shared MLP's matrices of Zamba-7B.
#define SIZES \
  ->ArgName("n")->Arg(3712)->Arg(2048 * 512)->Arg(14848 * 3712)->UseRealTime()->Unit(benchmark::kMicrosecond)
BENCHMARK(adamw<float>) SIZES;
BENCHMARK(adamw<bf16>) SIZES;
BENCHMARK(squares) SIZES;
