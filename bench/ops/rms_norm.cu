// SPDX-License-Identifier: MIT
// rms_norm on CUDA in bf16, with and without the second input, and of two inputs side by side: one token is bound by
// latencies, many by memory bandwidth.
#include <cmath>
#include <memory>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/rms_norm.cuh>

#include "../support/device.cuh"

using namespace zamba;
using namespace zamba::bench;

namespace {

constexpr double eps = 1e-5;

enum class Inputs { one, sum, side_by_side };

/// Positions of `width` from two arrays, or one.
struct Problem {
  Problem(Context<cuda>& ctx, Inputs kind, Index n, Index width)
      : inputs(kind),
        positions(n),
        part(kind == Inputs::side_by_side ? width / 2 : width),
        width(width),
        sets(sets_beyond_cache(bytes())),
        weight(ctx, width, 1) {
    for (Index i = 0; i < sets; ++i) {
      const auto stream = static_cast<std::uint64_t>(3 * i);
      a.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * part, stream + 2));
      b.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * part, stream + 3));
      out.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * width, stream + 4));
      rstd.push_back(std::make_unique<DeviceArray<float>>(ctx, n, 5));
    }
  }

  void run(Context<cuda>& ctx, Index set) const {
    const auto s = static_cast<std::size_t>(set);
    const auto first = a[s]->view(positions, part), second = b[s]->view(positions, part);
    const auto to = out[s]->view(positions, width);
    if (inputs == Inputs::side_by_side)
      rms_norm_concat(ctx, first, second, weight.view(width), eps, to, rstd[s]->view(positions));
    else
      rms_norm(ctx, first, inputs == Inputs::sum ? second : Matrix<bf16>{}, weight.view(width), eps, to,
               rstd[s]->view(positions));
  }

  /// The last position against the plain loop, to the rounding of bf16.
  bool right(Index set) const {
    const auto s = static_cast<std::size_t>(set);
    const auto first = a[s]->host(), second = b[s]->host(), got = out[s]->host();
    const auto weights = weight.host();
    std::vector<double> v;
    double squares = 0;
    for (Index c = 0; c < width; ++c) {
      const auto at = static_cast<std::size_t>((positions - 1) * part + c % part);
      double value = inputs == Inputs::side_by_side && c >= part ? second[at] : first[at];
      if (inputs == Inputs::sum) value += static_cast<double>(second[at]);
      v.push_back(value);
      squares += value * value;
    }
    for (Index c = 0; c < width; ++c) {
      const double wanted = static_cast<double>(weights[static_cast<std::size_t>(c)]) * v[static_cast<std::size_t>(c)] /
                            std::sqrt(squares / static_cast<double>(width) + eps);
      const double value = got[static_cast<std::size_t>((positions - 1) * width + c)];
      if (!(std::abs(value - wanted) <= std::abs(wanted) * 0x1p-8)) return false;
    }
    return true;
  }

  double bytes() const {
    const Index read = inputs == Inputs::sum ? 2 : 1;
    return 2.0 * static_cast<double>(positions * width * (read + 1)) + 4.0 * static_cast<double>(width);
  }

  Inputs inputs;
  Index positions, part, width, sets;
  DeviceArray<float> weight;
  std::vector<std::unique_ptr<DeviceArray<bf16>>> a, b, out;
  std::vector<std::unique_ptr<DeviceArray<float>>> rstd;
};

void rms_norm_forward(benchmark::State& state, Inputs inputs) {
  Context<cuda> ctx;
  const Problem p(ctx, inputs, state.range(0), state.range(1));
  p.run(ctx, p.sets - 1);
  if (!p.right(p.sets - 1)) return state.SkipWithError("rms_norm differs from the plain loop");
  time_on_device(state, ctx, p.sets, [&](Index set) { p.run(ctx, set); });
  report_on_device(state, 0, p.bytes());
}

}  // namespace

// Zamba-7B: the norm of a mixer, of one after a shared block, and of the shared block's input.
#define POSITIONS(width)             \
  ->ArgNames({"positions", "width"}) \
      ->Args({1, width})             \
      ->Args({64, width})            \
      ->Args({8192, width})          \
      ->UseManualTime()              \
      ->Unit(benchmark::kMicrosecond)
BENCHMARK_CAPTURE(rms_norm_forward, one, Inputs::one) POSITIONS(3712);
BENCHMARK_CAPTURE(rms_norm_forward, sum, Inputs::sum) POSITIONS(3712);
BENCHMARK_CAPTURE(rms_norm_forward, side_by_side, Inputs::side_by_side) POSITIONS(7424);
