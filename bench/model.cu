// SPDX-License-Identifier: MIT
// Whole models on CUDA with random weights in bf16: tokens after contexts, for batches, and prompts, in the device's
// own time; and generation as its caller sees it, to be compared with the bare token. docs/plots shows them, drawn by
// zamba_bench_plots.
#include <zamba/zamba.cuh>

#include <any>
#include <chrono>
#include <cmath>
#include <memory>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/models/llama.hpp>
#include <zamba/models/zamba2.hpp>
#include <zamba/models/zamba_7b.hpp>

#include "support/device.cuh"

namespace {

using namespace zamba;
using bench::DeviceTimer;

template <class Net>
using OnGpu = Model<Net, bf16, cuda>;

std::vector<Token> some_tokens(Index count) {
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Index i = 0; i < count; ++i) tokens[i] = static_cast<Token>(i * 37 % 251);
  return tokens;
}

/// Weights of variance 1/4 / (inputs of a product): layers add less to the stream than it has, as trained ones do. With
/// more, a random model of 76 layers makes a difference in the last bit of bf16 one in the second digit of its logits.
template <class Net>
OnGpu<Net> random_weights() {
  OnGpu<Net> model{Uninitialised{}};
  Context<cuda> ctx;
  std::uint64_t stream = 0;
  for (const ParameterEntry& entry : model.entries()) {
    std::byte* data = model.data(entry);
    const float scale = std::sqrt(3 / static_cast<float>(entry.shape.back()));
    if (entry.precise)
      ctx.fill(Vector<float>(reinterpret_cast<float*>(data), entry.size), 0.5f);
    else
      kernel::for_elements(ctx, 1, entry.size,
                           bench::RandomElement<bf16>{{reinterpret_cast<bf16*>(data), entry.size}, ++stream, scale},
                           "random_weights");
  }
  ctx.synchronize();
  return model;
}

/// Whether a prompt gives the logits that its parts give, the last of them single tokens: |difference| / |logits| below
/// 0.05, where bf16 rounds each of some hundred sums to 2^-9 of itself.
template <class Net>
bool cuts_agree(const OnGpu<Net>& model) {
  const std::vector<Token> prompt = some_tokens(70);
  const auto last = [&](std::initializer_list<Index> lengths) {
    Context<cuda> ctx;
    auto state = model.new_state({.batch = 1, .max_length = 70});
    std::vector<bf16> logits(static_cast<std::size_t>(Net::vocabulary));
    std::span<const Token> left(prompt);
    for (const Index length : lengths) {
      const auto there = model.extend(ctx, state, left.first(static_cast<std::size_t>(length)));
      left = left.subspan(static_cast<std::size_t>(length));
      Memory<cuda>::copy_to_host(logits.data(), there.data, logits.size() * sizeof(bf16));
    }
    return logits;
  };
  const auto whole = last({70}), cut = last({61, 5, 1, 1, 1, 1});
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const double wanted = whole[i], error = static_cast<double>(cut[i]) - wanted;
    difference += error * error;
    norm += wanted * wanted;
  }
  return norm > 0 && std::sqrt(difference / norm) < 0.05;
}

/// The model in use: one at a time, because a GPU may not hold two.
std::any& kept_model() {
  static std::any kept;
  return kept;
}

/// A model that was checked; null where the check failed.
template <class Net>
const OnGpu<Net>* checked_model() {
  std::any& kept = kept_model();
  using Kept = std::shared_ptr<OnGpu<Net>>;
  if (!std::any_cast<Kept>(&kept)) {
    kept.reset();
    auto model = std::make_shared<OnGpu<Net>>(random_weights<Net>());
    if (!cuts_agree<Net>(*model)) model.reset();
    kept = std::move(model);
  }
  return std::any_cast<Kept>(kept).get();
}

/// Bytes that a token of each row must move: weights once, recurrent states in and out, caches in.
template <class Net>
double token_bytes(Index batch, Index context) {
  const Index rewritten = state_bytes<Net, bf16>(batch, 0);
  return 2.0 * static_cast<double>(active_parameter_count<Net>) +
         static_cast<double>(state_bytes<Net, bf16>(batch, context) + rewritten);
}

/// Operations of a prompt: products of all weights but the head, which sees one position, and attention, which works
/// twice for every element of a cache that it meets.
template <class Net>
double prompt_flops(Index length) {
  const Index head = Net::vocabulary * Net::d_model;
  const Index cached = (state_bytes<Net, bf16>(1, 1) - state_bytes<Net, bf16>(1, 0)) / static_cast<Index>(sizeof(bf16));
  const double n = static_cast<double>(length);
  return 2 * static_cast<double>(active_parameter_count<Net> - head) * n + static_cast<double>(2 * head) +
         static_cast<double>(cached) * n * (n + 1);
}

template <class Net>
void decode(benchmark::State& state) {
  const Index batch = state.range(0), context = state.range(1);
  constexpr int tokens_at_once = 8;
  const auto* model = checked_model<Net>();
  if (!model) return state.SkipWithError("a prompt and its parts differ");
  Context<cuda> ctx;
  auto sequence = model->new_state({.batch = batch, .max_length = context + 600});
  const auto prompt = some_tokens(batch * context), tokens = some_tokens(batch);
  model->extend(ctx, sequence, {prompt, std::vector<Index>(static_cast<std::size_t>(batch), context)});
  const std::vector<Index> ones(static_cast<std::size_t>(batch), 1);
  for (int i = 0; i < 4; ++i) model->extend(ctx, sequence, {tokens, ones});
  DeviceTimer timer(ctx.stream());
  for (auto _ : state) {
    timer.start();
    for (int i = 0; i < tokens_at_once; ++i) model->extend(ctx, sequence, {tokens, ones});
    state.SetIterationTime(timer.stop() * 1e-3 / tokens_at_once);
  }
  bench::report_on_device(state, 2.0 * static_cast<double>(batch * active_parameter_count<Net>),
                          token_bytes<Net>(batch, context));
}

template <class Net>
void prefill(benchmark::State& state) {
  const Index length = state.range(0);
  const auto* model = checked_model<Net>();
  if (!model) return state.SkipWithError("a prompt and its parts differ");
  Context<cuda> ctx;
  auto sequence = model->new_state({.batch = 1, .max_length = length});
  const auto prompt = some_tokens(length);
  model->extend(ctx, sequence, prompt);
  DeviceTimer timer(ctx.stream());
  for (auto _ : state) {
    sequence.reset();
    timer.start();
    model->extend(ctx, sequence, prompt);
    state.SetIterationTime(timer.stop() * 1e-3);
  }
  // What was announced: weights, state and workspace; and what the GPU holds, with CUDA's and cuBLAS's own.
  std::size_t free = 0, total = 0;
  kernel::check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const ParameterEntry& last = model->entries().back();
  const std::size_t announced = last.byte_offset + model->bytes(last) + sequence.bytes() +
                                OnGpu<Net>::workspace_bytes({.batch = 1, .max_length = length});
  state.counters["announced_GB"] = 1e-9 * static_cast<double>(announced);
  state.counters["held_GB"] = 1e-9 * static_cast<double>(total - free);
  bench::report_on_device(state, prompt_flops<Net>(length),
                          static_cast<double>(2 * active_parameter_count<Net> + state_bytes<Net, bf16>(1, length)));
}

/// Seconds of a step, from call to return: prompts of one token, so there are as many steps as new tokens.
template <class Net>
void generation(benchmark::State& state) {
  const Index batch = state.range(0), context = 512, count = 32;
  const auto* model = checked_model<Net>();
  if (!model) return state.SkipWithError("a prompt and its parts differ");
  Context<cuda> ctx;
  auto sequence = model->new_state({.batch = batch, .max_length = context + 600});
  const auto prompt = some_tokens(batch * context);
  model->extend(ctx, sequence, {prompt, std::vector<Index>(static_cast<std::size_t>(batch), context)});
  std::vector<std::vector<Token>> prompts(static_cast<std::size_t>(batch));
  for (Index row = 0; row < batch; ++row) prompts[static_cast<std::size_t>(row)] = {static_cast<Token>(row)};
  GenerationOptions options{.max_new_tokens = count};
  if (state.range(1) == 0)
    options.sampling.temperature = 0;
  else
    options.sampling.top_p = static_cast<double>(state.range(1)) / 100;
  const auto run = [&] { generate(ctx, *model, sequence, std::span<const std::vector<Token>>(prompts), options); };
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

void contexts(benchmark::internal::Benchmark* b) {
  b->ArgNames({"batch", "context"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(4);
  for (const Index context : {512, 2048, 8192, 32768}) b->Args({1, context});
  for (const Index batch : {2, 4, 8, 16, 32, 64}) b->Args({batch, 512});
}

void lengths(benchmark::internal::Benchmark* b) {
  b->ArgName("tokens")->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(2);
  for (const Index length : {512, 2048, 8192, 32768}) b->Arg(length);
}

BENCHMARK(decode<Zamba7B>)->Name("decode/Zamba-7B")->Apply(contexts);
BENCHMARK(generation<Zamba7B>)
    ->Name("generation/Zamba-7B")
    ->ArgNames({"batch", "top_p_percent"})
    ->ArgsProduct({{1, 64}, {0, 95}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(4);
BENCHMARK(prefill<Zamba7B>)->Name("prefill/Zamba-7B")->Apply(lengths);
BENCHMARK(decode<Zamba2_2_7B>)->Name("decode/Zamba2-2.7B")->Apply(contexts);
BENCHMARK(prefill<Zamba2_2_7B>)->Name("prefill/Zamba2-2.7B")->Apply(lengths);
BENCHMARK(decode<Llama2_7B>)->Name("decode/Llama-2-7B")->Apply(contexts);
BENCHMARK(prefill<Llama2_7B>)->Name("prefill/Llama-2-7B")->Apply(lengths);

}  // namespace
