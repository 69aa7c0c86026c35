// SPDX-License-Identifier: MIT
// linear: decode reads weights (compare with the read bandwidth), prefill multiplies (compare with Eigen's own
// product).
#include <algorithm>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/linear.hpp>

#include "../support/ceilings.hpp"

using namespace zamba;

namespace {

template <class W>
struct Problem {
  Problem(const benchmark::State& state)
      : n(state.range(0)),
        in(state.range(1)),
        out(state.range(2)),
        x(static_cast<std::size_t>(n * in)),
        y(static_cast<std::size_t>(n * out)),
        weight(static_cast<std::size_t>(in * out)) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
    for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = W(static_cast<float>(i % 5) - 1);
  }
  Matrix<float> inputs() { return {x.data(), n, in}; }
  Matrix<W> weights() { return {weight.data(), out, in}; }
  Matrix<float> outputs() { return {y.data(), n, out}; }
  double flops() const { return 2.0 * static_cast<double>(n) * static_cast<double>(in) * static_cast<double>(out); }
  double weight_bytes() const { return static_cast<double>(weight.size() * sizeof(W)); }

  Index n, in, out;
  std::vector<float> x, y;
  std::vector<W> weight;
};

/// Small integers: float sums of them are exact, so any order must give the plain loop's number.
template <class W>
bool right(Problem<W>& p) {
  for (Index t = 0; t < p.n; t += std::max<Index>(1, p.n / 3))
    for (Index o = 0; o < p.out; o += std::max<Index>(1, p.out / 97)) {
      float sum = 0;
      for (Index k = 0; k < p.in; ++k) sum += p.inputs()(t, k) * static_cast<float>(p.weights()(o, k));
      if (p.outputs()(t, o) != sum) return false;
    }
  return true;
}

template <class W>
void linear_forward(benchmark::State& state) {
  Problem<W> p(state);
  Context<cpu> ctx;
  linear(ctx, p.inputs(), p.weights(), p.outputs());
  if (!right(p)) state.SkipWithError("linear differs from the plain loop");
  for (auto _ : state) {
    linear(ctx, p.inputs(), p.weights(), p.outputs());
    benchmark::ClobberMemory();
  }
  const double moved = p.weight_bytes() + static_cast<double>((p.x.size() + p.y.size()) * sizeof(float));
  bench::report(state, p.flops(), moved, ctx.threads(),
                p.n > 32 ? bench::eigen_product_rate(p.n, p.in, p.out, ctx.threads()) : 0);
}

void linear_both_gradients(benchmark::State& state) {
  Problem<float> p(state);
  Context<cpu> ctx;
  std::vector<float> d_x(p.x.size()), d_weight(p.weight.size());
  const Matrix<float> d_inputs(d_x.data(), p.n, p.in), d_weights(d_weight.data(), p.out, p.in);
  for (std::size_t i = 0; i < p.y.size(); ++i) p.y[i] = static_cast<float>(i % 3) - 1;
  const auto run = [&] {
    linear_backward(ctx, p.outputs(), p.inputs(), p.weights(), d_inputs, Accumulate::no, d_weights);
  };
  run();
  float input = 0, weight = 0;
  for (Index o = 0; o < p.out; ++o) input += p.outputs()(p.n - 1, o) * p.weights()(o, p.in - 1);
  for (Index t = 0; t < p.n; ++t) weight += p.outputs()(t, p.out - 1) * p.inputs()(t, p.in - 1);
  if (d_inputs(p.n - 1, p.in - 1) != input || d_weights(p.out - 1, p.in - 1) != weight)
    state.SkipWithError("linear_backward differs from the plain loop");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  bench::report(state, 2 * p.flops(), 0, ctx.threads(), bench::eigen_product_rate(p.n, p.in, p.out, ctx.threads()));
}

}  // namespace

// As large as in_proj of Zamba-7B's mixer (d 3712 to 2 D = 14848), and twice as large, decoded.
#define DECODE                        \
  ->ArgNames({"tokens", "in", "out"}) \
      ->Args({1, 3712, 14848})        \
      ->Args({1, 7424, 14848})        \
      ->Args({4, 3712, 14848})        \
      ->Args({1, 512, 2048})          \
      ->UseRealTime()                 \
      ->Unit(benchmark::kMicrosecond)
BENCHMARK(linear_forward<float>) DECODE;
BENCHMARK(linear_forward<bf16>) DECODE;

// A hybrid of d 512 at 1024 tokens: in_proj, out_proj, x_proj (R + 2N = 64), and the gate of the shared MLP.
#define PREFILL                       \
  ->ArgNames({"tokens", "in", "out"}) \
      ->Args({1024, 512, 2048})       \
      ->Args({1024, 1024, 512})       \
      ->Args({1024, 1024, 64})        \
      ->Args({1024, 1024, 2048})      \
      ->UseRealTime()                 \
      ->Unit(benchmark::kMicrosecond)
BENCHMARK(linear_forward<float>) PREFILL;
BENCHMARK(linear_forward<bf16>) PREFILL;
BENCHMARK(linear_both_gradients) PREFILL;
