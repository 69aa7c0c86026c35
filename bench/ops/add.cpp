// SPDX-License-Identifier: MIT
// add over 1024 positions: d 512 (a small hybrid) and 3712 (Zamba-7B).
#include <zamba/ops/add.hpp>

#include <vector>

#include <benchmark/benchmark.h>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

void forward(benchmark::State& state) {
  const Index positions = 1024, d = state.range(0);
  const std::vector<float> from(static_cast<std::size_t>(positions * d), 1.0f);
  std::vector<float> to(from.size(), 2.0f);
  Context<cpu> ctx;
  const auto run = [&] { add(ctx, {from.data(), positions, d}, Matrix<float>(to.data(), positions, d)); };
  run();
  if (to != std::vector<float>(to.size(), 3.0f)) return state.SkipWithError("differs from a plain sum");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(to.size());
  bench::report(state, size, 3 * size * sizeof(float));  // two reads, one write
}

BENCHMARK(forward)->Name("add/forward")->ArgName("d")->Arg(512)->Arg(3712)->UseRealTime();

}  // namespace
