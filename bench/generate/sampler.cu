// SPDX-License-Identifier: MIT
// sample_rows on CUDA: a token for each row of logits in bf16, in the device's own time.
#include <zamba/generate/sampler.cuh>

#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

template <class T>
Buffer<cuda> on_device(const std::vector<T>& values) {
  Buffer<cuda> buffer(values.size() * sizeof(T));
  Memory<cuda>::copy_from_host(buffer.data(), values.data(), buffer.size());
  return buffer;
}

/// Logits of a spread that leaves some hundred tokens to top-p 0.95.
struct Problem {
  Problem(Context<cuda>& ctx, Index rows, Index V, const SamplerOptions& how)
      : logits(ctx, rows * V, 1, 24),
        options(on_device(std::vector<SamplerOptions>{how})),
        random(on_device(std::vector<Random>(static_cast<std::size_t>(rows), Random(Seed{1})))),
        seen(on_device(std::vector<std::uint32_t>(static_cast<std::size_t>(rows * ceil_div(V, 32)), 0x10101010u))),
        left(on_device(std::vector<Index>(static_cast<std::size_t>(rows), 1))),
        drawn(on_device(std::vector<Drawn>(static_cast<std::size_t>(rows), Drawn{-1, Drawn::drawn}))),
        rows(rows),
        V(V),
        greedy(how.temperature == 0) {}

  void run(Context<cuda>& ctx) const {
    BatchSampler samplers;
    samplers.options = reinterpret_cast<const SamplerOptions*>(options.data());
    samplers.random = reinterpret_cast<Random*>(random.data());
    samplers.seen = {reinterpret_cast<std::uint32_t*>(seen.data()), rows, ceil_div(V, 32)};
    samplers.left = reinterpret_cast<const Index*>(left.data());
    samplers.drawn = reinterpret_cast<Drawn*>(drawn.data());
    sample_rows(ctx, samplers, rows, Matrix<const bf16>(logits.view(rows, V)), greedy);
  }
  /// Whether the first row got a token that the host's sampler draws, which for greedy is the only one.
  bool right(Context<cuda>& ctx, const SamplerOptions& how) const {
    run(ctx);
    ctx.synchronize();
    Drawn got;
    Memory<cuda>::copy_to_host(&got, drawn.data(), sizeof got);
    const std::vector<bf16> stored = logits.host();
    const std::vector<float> row(stored.begin(), stored.begin() + V);
    std::vector<Token> history;
    for (Token t = 4; t < V; t += 8) history.push_back(t);
    return got.checked() == Sampler(how, Seed{1}, V).sample(row, history);
  }

  bench::DeviceArray<bf16> logits;
  Buffer<cuda> options, random, seen, left, drawn;
  Index rows, V;
  bool greedy;
};

void sample(benchmark::State& state, const SamplerOptions& how) {
  Context<cuda> ctx;
  const Problem problem(ctx, state.range(0), state.range(1), how);
  if (!problem.right(ctx, how)) return state.SkipWithError("differs from Sampler");
  bench::time_on_device(state, ctx, 1, [&](Index) { problem.run(ctx); });
}

void shapes(benchmark::internal::Benchmark* benchmark) {
  for (const Index V : {32000, 128256})
    for (const Index rows : {1, 64}) benchmark->Args({rows, V});
  benchmark->UseManualTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(sample, greedy, SamplerOptions{.temperature = 0})->Apply(shapes);
BENCHMARK_CAPTURE(sample, greedy_with_penalty, SamplerOptions{.temperature = 0, .repetition_penalty = 1.1})
    ->Apply(shapes);
BENCHMARK_CAPTURE(sample, plain, SamplerOptions{})->Apply(shapes);
BENCHMARK_CAPTURE(sample, top_k, SamplerOptions{.top_k = 50})->Apply(shapes);
BENCHMARK_CAPTURE(sample, top_p, SamplerOptions{.top_p = 0.95})->Apply(shapes);
BENCHMARK_CAPTURE(sample, everything,
                  SamplerOptions{.top_k = 200, .top_p = 0.95, .min_p = 0.01, .repetition_penalty = 1.1})
    ->Apply(shapes);

}  // namespace
