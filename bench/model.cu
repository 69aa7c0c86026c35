// SPDX-License-Identifier: MIT
// Whole models on CUDA: a token of Zamba-7B, and its prompt, with random weights in bf16, in the device's own time.
#include <zamba/zamba.cuh>

#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/models/zamba_7b.hpp>

#include "support/device.cuh"

namespace {

using namespace zamba;
using bench::DeviceTimer;

/// Weights of no meaning, and of a size that keeps activations finite.
template <class Net>
const Model<Net, bf16, cuda>& model_of() {
  static const auto model = [] {
    Model<Net, bf16, cuda> made{Uninitialised{}};
    Context<cuda> ctx;
    for (const ParameterEntry& entry : made.entries()) {
      std::byte* data = made.data(entry);
      if (entry.precise)
        ctx.fill(Vector<float>(reinterpret_cast<float*>(data), entry.size), 0.5f);
      else
        ctx.fill(Vector<bf16>(reinterpret_cast<bf16*>(data), entry.size), bf16(1e-3f));
    }
    ctx.synchronize();
    return made;
  }();
  return model;
}

std::vector<Token> some_tokens(Index count) {
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Index i = 0; i < count; ++i) tokens[i] = static_cast<Token>(i * 37 % 251);
  return tokens;
}

template <class Net>
void decode(benchmark::State& state) {
  const Index batch = state.range(0), context = state.range(1);
  const auto& model = model_of<Net>();
  Context<cuda> ctx;
  auto sequence = model.new_state({.batch = batch, .max_length = context + 600});
  const auto prompt = some_tokens(batch * context), tokens = some_tokens(batch);
  model.extend(ctx, sequence, {prompt, std::vector<Index>(static_cast<std::size_t>(batch), context)});
  const std::vector<Index> ones(static_cast<std::size_t>(batch), 1);
  for (int i = 0; i < 4; ++i) model.extend(ctx, sequence, {tokens, ones});
  DeviceTimer timer(ctx.stream());
  for (auto _ : state) {
    timer.start();
    for (int i = 0; i < 8; ++i) model.extend(ctx, sequence, {tokens, ones});
    state.SetIterationTime(timer.stop() * 1e-3 / 8);
  }
  const double bytes = 2.0 * static_cast<double>(active_parameter_count<Net>);
  state.counters["weights_GB/s"] = benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

template <class Net>
void prefill(benchmark::State& state) {
  const Index length = state.range(0);
  const auto& model = model_of<Net>();
  Context<cuda> ctx;
  auto sequence = model.new_state({.batch = 1, .max_length = length});
  const auto prompt = some_tokens(length);
  model.extend(ctx, sequence, prompt);
  DeviceTimer timer(ctx.stream());
  for (auto _ : state) {
    sequence.reset();
    timer.start();
    model.extend(ctx, sequence, prompt);
    state.SetIterationTime(timer.stop() * 1e-3);
  }
}

BENCHMARK(decode<Zamba7B>)
    ->Args({1, 512})
    ->Args({1, 8192})
    ->Args({8, 512})
    ->Args({64, 512})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(8);
BENCHMARK(prefill<Zamba7B>)->Arg(2048)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(2);

}  // namespace
