// SPDX-License-Identifier: MIT
// linear on CUDA in bf16: with few tokens it reads weights (compare with the copy's bandwidth), with many it multiplies
// (compare with cuBLAS on large squares).
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/linear.cuh>

#include "../support/device.cuh"

using namespace zamba;
using namespace zamba::bench;

namespace {

/// x (n, heads, in), weight (heads, out, in) and y (n, heads, out), in as many sets as leave the cache cold.
struct Problem {
  Problem(Context<cuda>& ctx, Index tokens, Index head_count, Index inputs, Index outputs)
      : n(tokens), heads(head_count), in(inputs), out(outputs), sets(sets_beyond_cache(bytes())) {
    for (Index i = 0; i < sets; ++i) {
      const auto stream = static_cast<std::uint64_t>(3 * i);
      x.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * heads * in, stream + 1));
      weight.push_back(std::make_unique<DeviceArray<bf16>>(ctx, heads * out * in, stream + 2));
      y.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * heads * out, stream + 3));
    }
  }

  void run(Context<cuda>& ctx, Index set) const {
    const auto& to = *y[static_cast<std::size_t>(set)];
    const auto &from = *x[static_cast<std::size_t>(set)], &w = *weight[static_cast<std::size_t>(set)];
    if (heads == 1)
      linear(ctx, from.view(n, in), w.view(out, in), to.view(n, out));
    else
      linear_heads(ctx, from.view(n, heads, in), w.view(heads, out, in), to.view(n, heads, out));
  }

  /// Some elements against the plain loop: rounding to bf16, and of sums of `in` products.
  bool right(Index set) const {
    const auto s = static_cast<std::size_t>(set);
    const auto inputs = x[s]->host(), weights = weight[s]->host(), got = y[s]->host();
    for (Index t = 0; t < n; t += std::max<Index>(1, n / 5))
      for (Index h = 0; h < heads; ++h)
        for (Index o = 0; o < out; o += std::max<Index>(1, out / 97)) {
          double sum = 0, squares = 0;
          for (Index k = 0; k < in; ++k) {
            const double product = static_cast<double>(inputs[static_cast<std::size_t>((t * heads + h) * in + k)]) *
                                   static_cast<double>(weights[static_cast<std::size_t>((h * out + o) * in + k)]);
            sum += product, squares += product * product;
          }
          const double value = got[static_cast<std::size_t>((t * heads + h) * out + o)];
          if (!(std::abs(value - sum) <= std::abs(sum) * 0x1p-8 + std::sqrt(squares) * 1e-5)) return false;
        }
    return true;
  }

  double flops() const { return 2.0 * static_cast<double>(n * heads) * static_cast<double>(in * out); }
  double bytes() const { return 2.0 * static_cast<double>(heads * (in * out + n * (in + out))); }

  Index n, heads, in, out, sets;
  std::vector<std::unique_ptr<DeviceArray<bf16>>> x, weight, y;
};

void time_product(benchmark::State& state, Index n, Index heads, Index in, Index out) {
  Context<cuda> ctx;
  const Problem p(ctx, n, heads, in, out);
  p.run(ctx, p.sets - 1);
  if (!p.right(p.sets - 1)) return state.SkipWithError("linear differs from the plain loop");
  time_on_device(state, ctx, p.sets, [&](Index set) { p.run(ctx, set); });
  report_on_device(state, p.flops(), p.bytes());
}

void linear_forward(benchmark::State& state) { time_product(state, state.range(0), 1, state.range(1), state.range(2)); }

void linear_heads_forward(benchmark::State& state) {
  time_product(state, state.range(0), 2, state.range(1), state.range(2));
}

/// Both gradients, d_weight added in float32.
struct Gradients {
  Gradients(Context<cuda>& ctx, Index tokens, Index head_count, Index inputs, Index outputs)
      : n(tokens),
        heads(head_count),
        in(inputs),
        out(outputs),
        x(ctx, n * heads * in, 1),
        weight(ctx, heads * out * in, 2),
        d_y(ctx, n * heads * out, 3),
        d_x(ctx, n * heads * in, 4),
        d_weight(ctx, heads * out * in, 5),
        d_bias(ctx, heads * out, 6) {}

  void run(Context<cuda>& ctx) const {
    if (heads == 1)
      linear_backward(ctx, d_y.view(n, out), x.view(n, in), weight.view(out, in), d_x.view(n, in), Accumulate::no,
                      d_weight.view(out, in));
    else
      linear_heads_backward(ctx, d_y.view(n, heads, out), x.view(n, heads, in), weight.view(heads, out, in),
                            d_x.view(n, heads, in), Accumulate::no, d_weight.view(heads, out, in));
  }
  void run_bias(Context<cuda>& ctx) const {
    linear_backward(ctx, d_y.view(n, out), x.view(n, in), weight.view(out, in), Matrix<bf16>{}, Accumulate::no, {},
                    d_bias.view(out));
  }

  /// Some elements against the plain loop: rounding to bf16, and of the sums; tensor cores cut one off by 2^-23 where
  /// they add 16 products to it.
  bool right(Context<cuda>& ctx) const {
    const auto before = d_weight.host(), bias_before = d_bias.host();
    run(ctx);
    if (heads == 1) run_bias(ctx);
    const auto xs = x.host(), ws = weight.host(), d_ys = d_y.host(), d_xs = d_x.host();
    const auto d_ws = d_weight.host(), d_bs = d_bias.host();
    const auto at = [](const auto& values, Index i) {
      return static_cast<double>(values[static_cast<std::size_t>(i)]);
    };
    const auto close = [&](double value, double bits, Index count, auto&& product) {
      double sum = 0, squares = 0;
      for (Index k = 0; k < count; ++k) sum += product(k), squares += product(k) * product(k);
      return std::abs(value - sum) <=
             std::abs(sum) * bits + std::sqrt(squares) * (1e-5 + 0x1p-27 * static_cast<double>(count));
    };
    bool all = true;
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < in; i += std::max<Index>(1, in / 11)) {
        for (Index t = 0; t < n; t += std::max<Index>(1, n / 5))
          all = all && close(at(d_xs, (t * heads + h) * in + i), 0x1p-8, out, [&](Index o) {
                  return at(d_ys, (t * heads + h) * out + o) * at(ws, (h * out + o) * in + i);
                });
        for (Index o = 0; o < out; o += std::max<Index>(1, out / 7))
          all = all &&
                close(at(d_ws, (h * out + o) * in + i) - at(before, (h * out + o) * in + i), 1e-6, n,
                      [&](Index t) { return at(d_ys, (t * heads + h) * out + o) * at(xs, (t * heads + h) * in + i); });
      }
    for (Index o = 0; heads == 1 && o < out; o += std::max<Index>(1, out / 97))
      all = all && close(at(d_bs, o) - at(bias_before, o), 1e-6, n, [&](Index t) { return at(d_ys, t * out + o); });
    return all;
  }

  double flops() const { return 4.0 * static_cast<double>(n * heads) * static_cast<double>(in * out); }
  double bytes() const {
    return static_cast<double>(heads) * static_cast<double>(10 * in * out + 2 * n * (3 * in + 2 * out));
  }

  Index n, heads, in, out;
  DeviceArray<bf16> x, weight, d_y, d_x;
  DeviceArray<float> d_weight, d_bias;
};

void linear_both_gradients(benchmark::State& state) {
  Context<cuda> ctx;
  const Gradients p(ctx, state.range(0), state.range(1), state.range(2), state.range(3));
  if (!p.right(ctx)) return state.SkipWithError("linear_backward differs from the plain loop");
  time_on_device(
      state, ctx, 1, [&](Index) { p.run(ctx); }, 5);
  report_on_device(state, p.flops(), p.bytes());
}

void linear_bias_gradient(benchmark::State& state) {
  Context<cuda> ctx;
  const Gradients p(ctx, state.range(0), 1, 8, state.range(1));
  if (!p.right(ctx)) return state.SkipWithError("linear_backward differs from the plain loop");
  time_on_device(state, ctx, 1, [&](Index) { p.run_bias(ctx); });
  report_on_device(state, 0, 2.0 * static_cast<double>(p.n * p.out));
}

/// Every product of a token of Zamba-7B in bf16, 64 tokens at a time or fewer, in order and each with weights of its
/// own size that are not in the cache: its attention blocks count 13 times, its mixers 76 times.
void zamba_7b_products(benchmark::State& state) {
  struct Product {
    Index times, heads, in, out;
  };
  constexpr Product products[] = {{76, 1, 3712, 14848}, {76, 2, 3712, 264},  {76, 2, 232, 3712},   {76, 1, 7424, 3712},
                                  {39, 1, 7424, 7424},  {13, 1, 7424, 3712}, {13, 1, 3712, 29696}, {13, 1, 14848, 3712},
                                  {13, 1, 3712, 3712},  {1, 1, 3712, 32000}};
  Context<cuda> ctx;
  std::vector<std::unique_ptr<Problem>> problems;
  double flops = 0, bytes = 0;
  for (const Product& p : products) {
    problems.push_back(std::make_unique<Problem>(ctx, state.range(0), p.heads, p.in, p.out));
    flops += static_cast<double>(p.times) * problems.back()->flops();
    bytes += static_cast<double>(p.times) * problems.back()->bytes();
  }
  const auto token = [&](Index) {
    for (std::size_t i = 0; i < problems.size(); ++i)
      for (Index time = 0; time < products[i].times; ++time) problems[i]->run(ctx, time % problems[i]->sets);
  };
  token(0);
  for (const auto& p : problems)
    if (!p->right(0)) return state.SkipWithError("linear differs from the plain loop");
  time_on_device(state, ctx, 1, token, 1);
  report_on_device(state, flops, bytes);
}

}  // namespace

// Zamba-7B: in_proj, out_proj, q, gate and up, down of the shared block, linear after it, the head.
#define SHAPES                                                                    \
  ->ArgNames({"tokens", "in", "out"})                                             \
      ->ArgsProduct({{1, 4, 8, 16, 32, 64}, {3712}, {3712, 14848, 29696, 32000}}) \
      ->ArgsProduct({{1, 4, 8, 16, 32, 64}, {7424}, {3712, 7424}})                \
      ->ArgsProduct({{1, 16, 64}, {14848}, {3712}})                               \
      ->Args({128, 3712, 14848})                                                  \
      ->Args({2048, 3712, 14848})                                                 \
      ->UseManualTime()                                                           \
      ->Unit(benchmark::kMicrosecond)
BENCHMARK(linear_forward) SHAPES;

// x_proj and dt_proj of its mixers.
#define HEADS                                          \
  ->ArgNames({"tokens", "in", "out"})                  \
      ->ArgsProduct({{1, 8, 64, 2048}, {3712}, {264}}) \
      ->ArgsProduct({{1, 8, 64, 2048}, {232}, {3712}}) \
      ->UseManualTime()                                \
      ->Unit(benchmark::kMicrosecond)
BENCHMARK(linear_heads_forward) HEADS;
BENCHMARK(zamba_7b_products)
    ->ArgName("tokens")
    ->Arg(1)
    ->Arg(16)
    ->Arg(64)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

// Gradients of Zamba-7B's products, and of those of a net of d 1024; none of the inputs fit the cache but those of dt.
BENCHMARK(linear_both_gradients)
    ->Name("linear/backward")
    ->ArgNames({"tokens", "heads", "in", "out"})
    ->Args({4096, 1, 3712, 14848})
    ->Args({4096, 1, 7424, 3712})
    ->Args({4096, 1, 7424, 7424})
    ->Args({4096, 1, 3712, 29696})
    ->Args({4096, 2, 3712, 264})
    ->Args({4096, 2, 232, 3712})
    ->Args({16384, 1, 1024, 4096})
    ->Args({16384, 1, 2048, 1024})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(linear_bias_gradient)
    ->Name("linear/bias_backward")
    ->ArgNames({"tokens", "out"})
    ->Args({8192, 14848})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
