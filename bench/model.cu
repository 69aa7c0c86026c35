// SPDX-License-Identifier: MIT
// Whole models on CUDA: a token of Zamba-7B, and its prompt, with random weights in bf16, in the device's own time; and
// generation as its caller sees it, to be compared with the bare token.
#include <zamba/zamba.cuh>

#include <chrono>
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
      else  // the embedding is the head too, and its rows differ, as those of a trained one
        detail::for_elements(ctx, 1, entry.size,
                             bench::RandomElement<bf16>{Vector<bf16>(reinterpret_cast<bf16*>(data), entry.size), 1,
                                                        entry.name == "embedding.weight" ? 0.5f : 1e-3f},
                             "model_of");
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

/// Seconds of a step, from call to return: prompts of one token, so there are as many steps as new tokens.
template <class Net>
void generation(benchmark::State& state) {
  const Index batch = state.range(0), context = 512, count = 32;
  const auto& model = model_of<Net>();
  Context<cuda> ctx;
  auto sequence = model.new_state({.batch = batch, .max_length = context + 600});
  const auto prompt = some_tokens(batch * context);
  model.extend(ctx, sequence, {prompt, std::vector<Index>(static_cast<std::size_t>(batch), context)});
  std::vector<std::vector<Token>> prompts(static_cast<std::size_t>(batch));
  for (Index row = 0; row < batch; ++row) prompts[static_cast<std::size_t>(row)] = {static_cast<Token>(row)};
  GenerationOptions options{.max_new_tokens = count};
  if (state.range(1) == 0)
    options.sampling.temperature = 0;
  else
    options.sampling.top_p = static_cast<double>(state.range(1)) / 100;
  const auto run = [&] { generate(ctx, model, sequence, std::span<const std::vector<Token>>(prompts), options); };
  for (int i = 0; i < 3; ++i) run();
  ctx.synchronize();
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    ctx.synchronize();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    state.SetIterationTime(took.count() / static_cast<double>(count));
  }
}

BENCHMARK(generation<Zamba7B>)
    ->ArgNames({"batch", "top_p_percent"})
    ->ArgsProduct({{1, 64}, {0, 95}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(8);
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
