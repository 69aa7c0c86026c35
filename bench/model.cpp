// SPDX-License-Identifier: MIT
// Whole models on the CPU: a training step and a prefill of a small hybrid, with the share of their matrix products,
// and decode of models larger than any cache, with the share of the read bandwidth.
#include <numeric>

#include <benchmark/benchmark.h>

#include <zamba/zamba.hpp>

#include "support/ceilings.hpp"

namespace {

using namespace zamba;

template <Index Width, Index Layers>
using Hybrid = LanguageModel<
    256, HybridStack<Layers, 6, MambaBlock<MambaConfig{.d_model = Width, .d_state = 16, .n_heads = 2}>,
                     SharedAttention<SharedAttentionConfig{.d_model = Width, .n_heads = 8, .d_ff = 4 * Width}>>>;
using Small = Hybrid<512, 12>;
constexpr Index length = 1024;

/// One product y = x W^T of a pass: how often, and its extents.
struct Product {
  Index times, in, out;
};

/// The linear products of one forward pass of Small; attention's own products are not among them.
std::vector<Product> products_of_small() {
  using Mixer = Small::Stack::MixerType;
  using Shared = Small::Stack::SharedType;
  constexpr Index layers = Small::Stack::layers, uses = Small::Stack::uses, d = Small::d_model;
  return {{layers, d, 2 * Mixer::D},
          {layers * Mixer::H, Mixer::P, Mixer::R + 2 * Mixer::N},
          {layers * Mixer::H, Mixer::R, Mixer::P},
          {layers, Mixer::D, d},
          {uses * 3, Shared::width, Shared::q_width},
          {uses, Shared::q_width, d},
          {uses * 2, d, Shared::d_ff},
          {uses, Shared::d_ff, d},
          {uses, d, d}};
}

/// Seconds that the library's products, and Eigen's own at the same extents, take in one pass.
struct ProductTimes {
  double ours = 0, eigen = 0;
};

ProductTimes time_products(Context<cpu>& ctx, bool backward) {
  ProductTimes times;
  for (const Product& product : products_of_small()) {
    ArenaScope scope(ctx.arena());
    auto x = ctx.arena().tensor<float>(length, product.in), d_x = ctx.arena().tensor<float>(length, product.in);
    auto w = ctx.arena().tensor<float>(product.out, product.in),
         d_w = ctx.arena().tensor<float>(product.out, product.in);
    auto y = ctx.arena().tensor<float>(length, product.out);
    for (auto view : {x, w, y, d_w}) ctx.fill(view, 0.01f);
    const double forward = bench::least_seconds(7, [&] { linear(ctx, x, w, y); });
    const double both =
        backward ? bench::least_seconds(7, [&] { linear_backward(ctx, y, x, w, d_x, Accumulate::no, d_w); }) : 0;
    times.ours += static_cast<double>(product.times) * (forward + both);
    const double flops = 2.0 * static_cast<double>(length * product.in * product.out);
    const auto eigen = [&](Index m, Index k, Index n) {
      return flops / bench::eigen_product_rate(m, k, n, ctx.threads());
    };
    times.eigen += static_cast<double>(product.times) * eigen(length, product.in, product.out);
    if (backward)
      times.eigen += static_cast<double>(product.times) *
                     (eigen(length, product.out, product.in) + eigen(product.out, length, product.in));
  }
  return times;
}

void report_products(benchmark::State& state, Context<cpu>& ctx, bool backward) {
  static ProductTimes known[2];
  ProductTimes& times = known[backward];
  if (times.ours == 0) times = time_products(ctx, backward);
  const double flops = (backward ? 3.0 : 1.0) * static_cast<double>(length * flops_per_token<Small>);
  using benchmark::Counter;
  state.counters["GFLOP/s"] = Counter(flops * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["tokens/s"] = Counter(static_cast<double>(length), Counter::kIsIterationInvariantRate);
  state.counters["products_share"] = Counter(times.ours, Counter::kIsIterationInvariantRate);
  state.counters["products_of_eigen"] = times.eigen / times.ours;
}

const Model<Small>& small() {
  static const Model<Small> model(Seed{1});
  return model;
}

std::vector<Token> some_tokens(Index count) {
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Index i = 0; i < count; ++i) tokens[i] = static_cast<Token>(i * 37 % 251);
  return tokens;
}

void train_step(benchmark::State& state) {
  Context<cpu> ctx;
  const auto tokens = some_tokens(length + 1);
  const std::vector<Index> offsets{0, length};
  const TrainingBatch batch{std::span(tokens).first(length), std::span(tokens).last(length), offsets};
  auto gradients = small().new_gradients();
  const LossSum loss = small().loss_and_gradients(ctx, batch, gradients, {});
  if (!(std::abs(loss.mean() - small().loss(ctx, batch).mean()) < 1e-4)) state.SkipWithError("the two losses differ");
  for (auto _ : state) {
    gradients.zero();
    small().loss_and_gradients(ctx, batch, gradients, {});
  }
  report_products(state, ctx, true);
}

void prefill(benchmark::State& state) {
  Context<cpu> ctx;
  const auto tokens = some_tokens(length);
  auto sequence = small().new_state({.batch = 1, .max_length = length});
  for (auto _ : state) {
    sequence.reset();
    benchmark::DoNotOptimize(small().extend(ctx, sequence, tokens).data);
  }
  report_products(state, ctx, false);
}

/// Of each family some 230 to 280 M weights: of float or bf16, 0.9 to 1.3 or half as many GB are read for a token.
using Zamba = Hybrid<1536, 14>;
using Zamba2 = LanguageModel<
    256, HybridStack<14, 6, Mamba2Block<Mamba2Config{.d_model = 1536, .d_state = 64, .n_heads = 48}>,
                     SharedAttention<SharedAttentionConfig{
                         .d_model = 1536, .n_heads = 8, .d_ff = 4 * 1536, .rope = true, .mlp_adapter_rank = 128}>>>;
using Mamba = LanguageModel<256, UniformStack<16, MambaBlock<MambaConfig{.d_model = 1536}>>>;
using Mamba2 = LanguageModel<256, UniformStack<16, Mamba2Block<Mamba2Config{.d_model = 1536}>>>;
using Transformer =
    LanguageModel<256,
                  UniformStack<9, TransformerBlock<TransformerConfig{.d_model = 1536, .n_heads = 12, .d_ff = 4096}>>>;

template <class Net, class T>
const Model<Net, T>& large() {
  if constexpr (std::is_same_v<T, float>) {
    static const Model<Net> model(Seed{1});
    return model;
  } else {
    static const auto model = large<Net, float>().template to<T>();
    return model;
  }
}

template <class Net, class T>
void decode(benchmark::State& state) {
  Context<cpu> ctx;
  const Model<Net, T>& model = large<Net, T>();
  auto sequence = model.new_state({.batch = 1, .max_length = 4096});
  model.extend(ctx, sequence, some_tokens(16));
  for (auto _ : state) {
    if (sequence.length() == sequence.max_length()) sequence.reset();
    benchmark::DoNotOptimize(model.extend(ctx, sequence, Token{65}).data);
  }
  const double bytes = static_cast<double>(active_parameter_count<Net>) * sizeof(T);
  using benchmark::Counter;
  state.counters["tokens/s"] = Counter(1, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["of_bandwidth"] =
      Counter(bytes / bench::read_bandwidth(ctx.threads()), Counter::kIsIterationInvariantRate);
}

void timed_well(benchmark::internal::Benchmark* benchmark) {
  benchmark->Unit(benchmark::kMillisecond)->UseRealTime()->MinTime(3)->Repetitions(3);
}

BENCHMARK(train_step)->Apply(timed_well);
BENCHMARK(prefill)->Apply(timed_well);
BENCHMARK(decode<Zamba, float>)->Apply(timed_well);
BENCHMARK(decode<Zamba, bf16>)->Apply(timed_well);
BENCHMARK(decode<Zamba2, float>)->Apply(timed_well);
BENCHMARK(decode<Zamba2, bf16>)->Apply(timed_well);
BENCHMARK(decode<Mamba, float>)->Apply(timed_well);
BENCHMARK(decode<Mamba, bf16>)->Apply(timed_well);
BENCHMARK(decode<Mamba2, float>)->Apply(timed_well);
BENCHMARK(decode<Mamba2, bf16>)->Apply(timed_well);
BENCHMARK(decode<Transformer, float>)->Apply(timed_well);
BENCHMARK(decode<Transformer, bf16>)->Apply(timed_well);

}  // namespace
