// SPDX-License-Identifier: MIT
// gated_activation on CUDA in bf16, compared with the copy's bandwidth.
#include <cmath>
#include <memory>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/gated_activation.cuh>

#include "../support/device.cuh"

using namespace zamba;
using namespace zamba::bench;

namespace {

double activated(Activation activation, double x) {
  return activation == Activation::gelu ? x * 0.5 * std::erfc(-x / std::sqrt(2.0)) : x / (1 + std::exp(-x));
}

void gated(benchmark::State& state, Activation activation) {
  Context<cuda> ctx;
  const Index n = state.range(0), width = state.range(1);
  const double bytes = 6.0 * static_cast<double>(n * width);
  const Index sets = sets_beyond_cache(bytes);
  std::vector<std::unique_ptr<DeviceArray<bf16>>> gate_up, out;
  for (Index i = 0; i < sets; ++i) {
    const auto stream = static_cast<std::uint64_t>(2 * i);
    gate_up.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * 2 * width, stream + 1, 8.0f));
    out.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * width, stream + 2));
  }
  const auto run = [&](Index set) {
    const auto both = gate_up[static_cast<std::size_t>(set)]->view(n, 2 * width);
    gated_activation(ctx, activation, both.columns(0, width), both.columns(width, width),
                     out[static_cast<std::size_t>(set)]->view(n, width));
  };
  run(0);
  const auto inputs = gate_up[0]->host(), got = out[0]->host();
  for (Index j = 0; j < width; ++j) {
    const auto row = static_cast<std::size_t>((n - 1) * 2 * width), at = static_cast<std::size_t>(j);
    const double wanted = activated(activation, static_cast<double>(inputs[row + at])) *
                          static_cast<double>(inputs[row + static_cast<std::size_t>(width) + at]);
    const double value = got[static_cast<std::size_t>((n - 1) * width) + at];
    if (!(std::abs(value - wanted) <= std::abs(wanted) * 0x1p-8))
      return state.SkipWithError("gated_activation differs from the plain loop");
  }
  time_on_device(state, ctx, sets, run);
  report_on_device(state, 0, bytes);
}

double slope(Activation activation, double x) {
  const double gate = 1 / (1 + std::exp(-x));
  return activation == Activation::gelu
             ? 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0))
             : gate * (1 + x * (1 - gate));
}

void gated_backward(benchmark::State& state, Activation activation) {
  Context<cuda> ctx;
  const Index n = state.range(0), width = state.range(1);
  const double bytes = 10.0 * static_cast<double>(n * width);  // gate, up, d_out; d_gate, d_up
  const Index sets = sets_beyond_cache(bytes), rows = sets * n;
  const DeviceArray<bf16> gate_up(ctx, rows * 2 * width, 1, 8), d_gate_up(ctx, rows * 2 * width, 2),
      d_out(ctx, rows * width, 3);
  const auto run = [&](Index set) {
    const auto both = gate_up.view(rows, 2 * width).slice(set * n, n);
    const auto d_both = d_gate_up.view(rows, 2 * width).slice(set * n, n);
    gated_activation_backward(ctx, activation, d_out.view(rows, width).slice(set * n, n), both.columns(0, width),
                              both.columns(width, width), d_both.columns(0, width), d_both.columns(width, width));
  };
  run(0);
  const auto inputs = gate_up.host(), d = d_out.host(), got = d_gate_up.host();
  const auto near = [](double value, double wanted) {
    return std::abs(value - wanted) <= std::abs(wanted) * 0x1p-8 + 1e-6;
  };
  for (Index j = 0; j < width; ++j) {
    const auto gate = static_cast<std::size_t>((n - 1) * 2 * width + j), up = gate + static_cast<std::size_t>(width);
    const double x = inputs[gate], by = d[static_cast<std::size_t>((n - 1) * width + j)];
    if (!near(got[gate], by * static_cast<double>(inputs[up]) * slope(activation, x)) ||
        !near(got[up], by * activated(activation, x)))
      return state.SkipWithError("gated_activation_backward differs from the plain loop");
  }
  time_on_device(state, ctx, sets, run);
  report_on_device(state, 0, bytes);
}

}  // namespace

BENCHMARK_CAPTURE(gated_backward, gelu, Activation::gelu)
    ->Name("gated/gelu/backward")
    ->ArgNames({"tokens", "width"})
    ->Args({2048, 14848})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(gated_backward, silu, Activation::silu)
    ->Name("gated/silu/backward")
    ->ArgNames({"tokens", "width"})
    ->Args({2048, 11008})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

// The MLP of Zamba-7B's shared block, and that of Llama-2-7B.
BENCHMARK_CAPTURE(gated, gelu, Activation::gelu)
    ->ArgNames({"tokens", "width"})
    ->ArgsProduct({{1, 64, 2048}, {14848}})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(gated, silu, Activation::silu)
    ->ArgNames({"tokens", "width"})
    ->ArgsProduct({{1, 64, 2048}, {11008}})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
