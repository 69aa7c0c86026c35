// SPDX-License-Identifier: MIT
// adamw_step and sum_of_squares on CUDA, compared with the copy's bandwidth: a norm's weight, a matrix of Zamba-7B's
// shared MLP, and 1 B parameters. A step reads and writes weight and moments and reads the gradient.
#include <zamba/ops/adamw_step.cuh>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;
using bench::DeviceArray;

constexpr AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1};

template <class T>
std::vector<T> some_of(const DeviceArray<T>& array, Index first, Index count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  Memory<cuda>::copy_to_host(values.data(), array.view(array.size()).data + first, values.size() * sizeof(T));
  return values;
}

template <class W>
void adamw(benchmark::State& state) {
  constexpr bool split = std::is_same_v<W, bf16>;
  Context<cuda> ctx;
  const Index n = state.range(0);
  const DeviceArray<W> weight(ctx, n, 1, 4);
  const DeviceArray<float> gradient(ctx, n, 2), m(ctx, n, 4), v(ctx, n, 5);
  const DeviceArray<std::uint16_t> low(ctx, split ? n : 0, 6);
  const DeviceArray<double> norm_squared(ctx, 1, 7);
  ctx.fill(norm_squared.view(1), 0.25);
  for (const auto* moments : {&m, &v}) ctx.zero(moments->view(n));
  AdamWTensors<W, float> tensors{weight.view(n), {}, gradient.view(n), m.view(n), v.view(n)};
  if (split) tensors.low = low.view(n), ctx.zero(tensors.low);
  const auto run = [&](Index) { adamw_step(ctx, tensors, scalars, norm_squared.view(1).data); };

  // The first step moves by the learning rate against the gradient, after the decay; here at the array's end.
  const Index count = std::min<Index>(n, 1000), first = n - count;
  const auto stands_for = [&] {
    std::vector<double> values;
    const auto weights = some_of(weight, first, count);
    const auto lower = split ? some_of(low, first, count) : std::vector<std::uint16_t>();
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if constexpr (split)
        values.push_back(static_cast<float>(SplitFloat(weights[i], lower[i])));
      else
        values.push_back(weights[i]);
    }
    return values;
  };
  const auto before = stands_for();
  const auto gradients = some_of(gradient, first, count);
  run(0);
  const auto after = stands_for();
  for (std::size_t i = 0; i < after.size(); ++i) {
    const double wanted = before[i] * (1 - 1e-4) - (gradients[i] > 0 ? 1e-3 : -1e-3);
    if (std::abs(gradients[i]) > 1e-3 && !(std::abs(after[i] - wanted) <= 1e-6))
      return state.SkipWithError("adamw_step differs from its definition");
  }
  bench::time_on_device(state, ctx, 1, run);
  bench::report_on_device(state, 15.0 * static_cast<double>(n), 28.0 * static_cast<double>(n));
}

void squares(benchmark::State& state) {
  Context<cuda> ctx;
  const Index n = state.range(0);
  const DeviceArray<float> values(ctx, n, 1);
  const DeviceArray<double> sum(ctx, 1, 2);
  const auto run = [&](Index) { sum_of_squares(ctx, values.view(n), sum.view(1).data); };
  run(0);
  // Uniform between -0.5 and 0.5: squares of mean 1/12 and deviation 1/sqrt(180), six of which are allowed.
  const double mean = sum.host()[0] / static_cast<double>(n);
  if (!(std::abs(mean - 1.0 / 12) <= 6 / std::sqrt(180.0 * static_cast<double>(n))))
    return state.SkipWithError("sum_of_squares is wrong");
  bench::time_on_device(state, ctx, 1, run);
  bench::report_on_device(state, 2.0 * static_cast<double>(n), sizeof(float) * static_cast<double>(n));
}

}  // namespace

#define SIZES \
  ->ArgName("n")->Arg(3712)->Arg(14848 * 3712)->Arg(1'000'000'000)->UseManualTime()->Unit(benchmark::kMicrosecond)
BENCHMARK(adamw<float>)->Name("adamw_step/cuda/float") SIZES;
BENCHMARK(adamw<bf16>)->Name("adamw_step/cuda/bf16_and_lower_half") SIZES;
BENCHMARK(squares)->Name("sum_of_squares/cuda") SIZES;
