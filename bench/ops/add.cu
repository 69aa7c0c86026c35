// SPDX-License-Identifier: MIT
// add in bf16 on CUDA: the residual gradient of Zamba-7B (d 3712), compared with the copy's bandwidth.
#include <zamba/ops/add.cuh>

#include <cmath>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

void forward(benchmark::State& state) {
  Context<cuda> ctx;
  const Index n = state.range(0), d = state.range(1);
  const double bytes = 3.0 * sizeof(bf16) * static_cast<double>(n * d);  // two reads, one write
  const Index sets = bench::sets_beyond_cache(bytes);
  const bench::DeviceArray<bf16> from(ctx, sets * n * d, 1), to(ctx, sets * n * d, 2);
  const auto run = [&](Index set) {
    add(ctx, from.view(sets * n, d).slice(set * n, n), to.view(sets * n, d).slice(set * n, n));
  };
  const auto source = from.host(), before = to.host();
  run(0);
  const auto after = to.host();
  for (std::size_t i = 0; i < after.size(); ++i) {
    const bool added = i < static_cast<std::size_t>(n * d);
    if (after[i].bits != (added ? bf16(before[i] + source[i]) : before[i]).bits)
      return state.SkipWithError("differs from a plain sum");
  }
  bench::time_on_device(state, ctx, sets, run);
  bench::report_on_device(state, 0, bytes);
}

BENCHMARK(forward)
    ->Name("add/cuda/forward")
    ->ArgNames({"positions", "d"})
    ->Args({64, 3712})
    ->Args({8192, 3712})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
