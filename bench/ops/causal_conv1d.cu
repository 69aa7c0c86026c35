// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA in bf16, width 4: prompts of Zamba-7B's mixer (D 7424, u inside rows of 2 D), and single tokens
// of it, one and 64 rows; and the gradients of prompts. Inputs go in turn with others, so that none of them is in the
// cache.
#include <zamba/ops/causal_conv1d.cuh>

#include <cmath>
#include <memory>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/testing/report.hpp>

#include "../support/device.cuh"

namespace {

using namespace zamba;

constexpr Index D = 7424, K = 4;

/// The inputs of `rows` rows of `length` tokens, which continue from a state.
struct Data {
  Index rows, length, tokens;
  bench::DeviceArray<bf16> x, out;
  bench::DeviceArray<float> weight, bias, state;
  Sequences sequences;

  Data(Context<cuda>& ctx, Index rows, Index length, std::uint64_t set)
      : rows(rows),
        length(length),
        tokens(rows * length),
        x(ctx, tokens * 2 * D, 10 * set, 4),
        out(ctx, tokens * D, 10 * set + 1),
        weight(ctx, D * K, 2, 2),
        bias(ctx, D, 3, 2),
        state(ctx, rows * (K - 1) * D, 10 * set + 4, 4) {
    sequences = bench::equal_rows(ctx, rows, length, K);
  }

  void run(Context<cuda>& ctx) const {
    causal_conv1d(ctx, x.view(tokens, 2 * D).columns(0, D), Matrix<const float>(weight.view(D, K)),
                  Vector<const float>(bias.view(D)), sequences, state.view(rows, K - 1, D), out.view(tokens, D));
  }

  /// Whether some channels are as on the host in double, by norm to bf16's 2^-9 of each output; and the states exactly.
  bool right(Context<cuda>& ctx) const {
    const auto xs = x.host();
    const auto ws = weight.host(), bs = bias.host(), before = state.host();
    run(ctx);
    ctx.synchronize();
    const auto outs = out.host();
    const auto after = state.host();
    std::vector<double> ours, theirs;
    bool kept = true;
    for (Index row = 0; row < rows; ++row)
      for (const Index c : {Index{0}, Index{7}, Index{519}, D - 1}) {
        const auto input = [&](Index i) -> double {
          return i >= 0 ? float(xs[at((row * length + i) * 2 * D + c)])
                        : before[at((row * (K - 1) + K - 1 + i) * D + c)];
        };
        for (Index t = 0; t < length; ++t) {
          double p = bs[at(c)];
          for (Index j = 0; j < K; ++j) p += ws[at(c * K + j)] * input(t - (K - 1) + j);
          ours.push_back(outs[at((row * length + t) * D + c)]);
          theirs.push_back(p / (1 + std::exp(-p)));
        }
        for (Index slot = 0; slot < K - 1; ++slot)
          kept = kept && after[at((row * (K - 1) + slot) * D + c)] == input(length - (K - 1) + slot);
      }
    return kept && testing::relative_error(ours, theirs) < 0x1p-9;
  }

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
};

void forward(benchmark::State& state) {
  Context<cuda> ctx;
  const Index rows = state.range(0), length = state.range(1);
  const double elements = static_cast<double>(rows * length * D);
  const double bytes = 2 * elements * sizeof(bf16) + static_cast<double>(2 * rows * (K - 1) * D) * sizeof(float);
  if (!Data(ctx, rows, length, 0).right(ctx)) return state.SkipWithError("differs from the host");
  bench::time_sets_on_device(state, ctx, bytes,
                             [&](Index set) { return std::make_unique<Data>(ctx, rows, length, set + 1); });
  bench::report_on_device(state, (2 * K + 4) * elements, bytes);
}

/// Training: rows without a past.
struct Gradient {
  Index rows, length, tokens;
  bench::DeviceArray<bf16> x, d_out, d_x;
  bench::DeviceArray<float> weight, bias, d_weight, d_bias;
  Sequences sequences;

  Gradient(Context<cuda>& ctx, Index rows, Index length, std::uint64_t set)
      : rows(rows),
        length(length),
        tokens(rows * length),
        x(ctx, tokens * 2 * D, 10 * set, 4),
        d_out(ctx, tokens * D, 10 * set + 1),
        d_x(ctx, tokens * 2 * D, 10 * set + 2),
        weight(ctx, D * K, 2, 2),
        bias(ctx, D, 3, 2),
        d_weight(ctx, D * K, 4),
        d_bias(ctx, D, 5),
        sequences(bench::equal_rows(ctx, rows, length, 0)) {}

  void run(Context<cuda>& ctx) const {
    causal_conv1d_backward(ctx, d_out.view(tokens, D), x.view(tokens, 2 * D).columns(0, D),
                           Matrix<const float>(weight.view(D, K)), Vector<const float>(bias.view(D)), sequences, {},
                           d_x.view(tokens, 2 * D).columns(0, D), d_weight.view(D, K), d_bias.view(D), {});
  }

  /// Whether some channels are as on the host in double: d_x by norm to bf16's 2^-9 of each, what is added to d_weight
  /// and d_bias to the rounding of a sum over all tokens.
  bool right(Context<cuda>& ctx) const {
    const auto at = Data::at;
    const auto xs = x.host(), ds = d_out.host();
    const auto ws = weight.host(), bs = bias.host(), w_before = d_weight.host(), b_before = d_bias.host();
    run(ctx);
    ctx.synchronize();
    const auto got = d_x.host();
    const auto w_after = d_weight.host(), b_after = d_bias.host();
    std::vector<double> ours, theirs, our_sums, their_sums;
    for (const Index c : {Index{0}, Index{7}, Index{519}, D - 1}) {
      std::vector<double> sums(K + 1);
      for (Index row = 0; row < rows; ++row) {
        const auto input = [&](Index i) -> double { return i < 0 ? 0 : float(xs[at((row * length + i) * 2 * D + c)]); };
        std::vector<double> d_p;
        for (Index t = 0; t < length; ++t) {
          double p = bs[at(c)];
          for (Index j = 0; j < K; ++j) p += ws[at(c * K + j)] * input(t - (K - 1) + j);
          const double gate = 1 / (1 + std::exp(-p));
          d_p.push_back(ds[at((row * length + t) * D + c)] * gate * (1 + p * (1 - gate)));
          for (Index j = 0; j < K; ++j) sums[at(j)] += d_p.back() * input(t - (K - 1) + j);
          sums[at(K)] += d_p.back();
        }
        for (Index t = 0; t < length; ++t) {
          double sum = 0;
          for (Index j = 0; j < K; ++j)
            if (const Index from = t + (K - 1) - j; from < length) sum += ws[at(c * K + j)] * d_p[at(from)];
          ours.push_back(got[at((row * length + t) * 2 * D + c)]);
          theirs.push_back(sum);
        }
      }
      for (Index j = 0; j < K; ++j)
        our_sums.push_back(static_cast<double>(w_after[at(c * K + j)]) - w_before[at(c * K + j)]);
      our_sums.push_back(static_cast<double>(b_after[at(c)]) - b_before[at(c)]);
      their_sums.insert(their_sums.end(), sums.begin(), sums.end());
    }
    return testing::relative_error(ours, theirs) < 0x1p-9 && testing::relative_error(our_sums, their_sums) < 1e-5;
  }
};

void backward(benchmark::State& state) {
  Context<cuda> ctx;
  const Index rows = state.range(0), length = state.range(1);
  const double elements = static_cast<double>(rows * length * D), bytes = 3 * elements * sizeof(bf16);
  if (!Gradient(ctx, rows, length, 0).right(ctx)) return state.SkipWithError("differs from the host");
  bench::time_sets_on_device(state, ctx, bytes,
                             [&](Index set) { return std::make_unique<Gradient>(ctx, rows, length, set + 1); });
  bench::report_on_device(state, (6 * K + 10) * elements, bytes);
}

BENCHMARK(backward)
    ->Name("causal_conv1d/cuda/backward")
    ->ArgNames({"rows", "tokens"})
    ->Args({1, 2048})
    ->Args({8, 2048})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

BENCHMARK(forward)
    ->Name("causal_conv1d/cuda/forward")
    ->ArgNames({"rows", "tokens"})
    ->Args({1, 512})
    ->Args({1, 2048})
    ->Args({1, 8192})
    ->Args({8, 2048})
    ->Args({1, 1})
    ->Args({64, 1})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
