// SPDX-License-Identifier: MIT
// A training step on CUDA in bf16, as its caller sees it: losses, gradients, AdamW, from call to return.
#include <zamba/zamba.cuh>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include "support/device.cuh"

namespace {

using namespace zamba;

/// The Zamba of 239 M weights that docs/benchmarks.md compares with.
using Zamba239M =
    LanguageModel<32000, PatternStack<zamba_pattern<26, 6, 4>, MambaBlock<MambaConfig{.d_model = 1024, .n_heads = 2}>,
                                      SharedAttention<SharedAttentionConfig{.d_model = 1024, .n_heads = 16}>>>;

/// Rows of random tokens, each the target of the one before it.
struct Batch {
  std::vector<Token> tokens, targets;
  std::vector<Index> offsets{0};

  Batch(Index rows, Index length, Index vocabulary) {
    Random random(Seed{1}, 0);
    for (Index i = 0; i < rows * length; ++i) tokens.push_back(static_cast<Token>(random.below(vocabulary)));
    targets.assign(tokens.begin() + 1, tokens.end());
    targets.push_back(-1);
    for (Index row = 0; row < rows; ++row) offsets.push_back((row + 1) * length);
  }
  operator TrainingBatch() const { return {tokens, targets, offsets}; }
};

template <class Net>
void step(benchmark::State& state) {
  using ModelType = Model<Net, bf16, cuda>;
  const Index rows = state.range(0), length = state.range(1);
  const Keep keep = static_cast<Keep>(state.range(2));
  const Batch batch(rows, length, Net::vocabulary);
  Context<cuda> ctx;
  ModelType model(Seed{1});
  auto gradients = model.new_gradients();
  AdamW optimiser(model);
  double norm = 0;
  const auto losses = [&] {
    gradients.zero();
    const double loss = model.loss_and_gradients(ctx, batch, gradients, {.keep = keep}).mean();
    return loss;
  };
  const auto train = [&] {
    const double loss = losses();
    optimiser.step(ctx, model, gradients, 1e-3);
    norm = optimiser.gradient_norm();
    return loss;
  };
  // The same numbers again, about log(V) at first, and less of it after some steps on one batch.
  const double first = losses();
  if (losses() != first) return state.SkipWithError("a rerun gives another loss");
  if (!(std::abs(first - std::log(static_cast<double>(Net::vocabulary))) < 1.5))
    return state.SkipWithError("the first loss is not about that of guessing");
  for (int i = 0; i < 5; ++i) train();
  if (!(train() < first && norm > 0)) return state.SkipWithError("training does not lower the loss");

  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    train();
    ctx.synchronize();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    state.SetIterationTime(took.count());
  }
  std::size_t free = 0, total = 0;
  kernel::check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const double tokens = static_cast<double>(rows * length);
  const auto rate = benchmark::Counter::kIsIterationInvariantRate;
  state.counters["tokens/s"] = benchmark::Counter(tokens, rate);
  // 6 operations a weight that a token meets and 989 TFLOP/s: what shares of the peak are usually quoted in.
  state.counters["of_peak"] =
      benchmark::Counter(tokens * 6 * static_cast<double>(active_parameter_count<Net>) / 989e12, rate);
  state.counters["announced_GB"] = 1e-9 * static_cast<double>(ModelType::training_bytes({rows, length, keep}).total());
  state.counters["held_GB"] = 1e-9 * static_cast<double>(total - free);
}

BENCHMARK_TEMPLATE(step, Zamba239M)
    ->Name("training/Zamba239M")
    ->ArgNames({"rows", "tokens", "keep"})
    ->Args({8, 2048, static_cast<Index>(Keep::everything)})
    ->Args({8, 2048, static_cast<Index>(Keep::costly)})
    ->Args({8, 2048, static_cast<Index>(Keep::layer_inputs)})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
