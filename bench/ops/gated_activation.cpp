// SPDX-License-Identifier: MIT
// gated_activation: elementwise, bound by memory once its exponential is vectorised.
#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/gated_activation.hpp>

#include "../support/ceilings.hpp"

using namespace zamba;

namespace {

template <Activation activation>
void gated(benchmark::State& state) {
  const Index n = state.range(0), f = state.range(1);
  const bool backward = state.range(2);
  Context<cpu> ctx;
  const auto size = static_cast<std::size_t>(n * f);
  std::vector<float> gate(size), up(size, 2.0f), out(size), d_gate(size), d_up(size);
  for (std::size_t i = 0; i < size; ++i) gate[i] = static_cast<float>(i % 1201) * 0.01f - 6;
  const Matrix<float> g(gate.data(), n, f), u(up.data(), n, f), o(out.data(), n, f);
  const Matrix<float> d_g(d_gate.data(), n, f), d_u(d_up.data(), n, f);
  const auto run = [&] {
    if (backward)
      gated_activation_backward(ctx, activation, u, g, u, d_g, d_u);
    else
      gated_activation(ctx, activation, g, u, o);
  };
  run();
  for (std::size_t i = 0; i < size; i += 13) {  // with d_out = up = 2, d_up is out
    const double x = gate[i],
                 act = activation == Activation::gelu ? x * std::erfc(-x / std::sqrt(2.0)) / 2 : x / (1 + std::exp(-x));
    if (std::abs((backward ? d_up[i] : out[i]) - 2 * act) > 2e-6)
      state.SkipWithError("gated_activation differs from the plain loop");
  }
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  // A polynomial of degree 8, an exponential of degree 7 and a division: about 40 operations an element.
  bench::report(state, 40.0 * static_cast<double>(size),
                (backward ? 5.0 : 3.0) * static_cast<double>(size * sizeof(float)), ctx.threads());
}

}  // namespace

// The shared MLP of a hybrid of d 512 (d_ff 2048) at 1024 tokens, and of Zamba-7B (d_ff 14848) at 256 and at one.
#define SIZES                                    \
  ->ArgNames({"tokens", "d_ff", "backward"})     \
      ->ArgsProduct({{1024}, {2048}, {0, 1}})    \
      ->ArgsProduct({{1, 256}, {14848}, {0, 1}}) \
      ->UseRealTime()                            \
      ->Unit(benchmark::kMicrosecond)
BENCHMARK(gated<Activation::gelu>) SIZES;
BENCHMARK(gated<Activation::silu>) SIZES;
