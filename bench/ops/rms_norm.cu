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
        weight(ctx, width, 1),
        d_weight(ctx, width, 6) {
    for (Index i = 0; i < sets; ++i) {
      const auto stream = static_cast<std::uint64_t>(3 * i);
      a.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * part, stream + 2));
      b.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * part, stream + 3));
      out.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * width, stream + 4));
      rstd.push_back(std::make_unique<DeviceArray<float>>(ctx, n, 5));
      d_a.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * part, stream + 5));
      d_b.push_back(std::make_unique<DeviceArray<bf16>>(ctx, n * part, stream + 6));
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

  /// Of `out` as the gradient that comes in.
  void run_backward(Context<cuda>& ctx, Index set) const {
    const auto s = static_cast<std::size_t>(set);
    const auto first = a[s]->view(positions, part), second = b[s]->view(positions, part);
    const auto d_out = out[s]->view(positions, width);
    const auto d_first = d_a[s]->view(positions, part), d_second = d_b[s]->view(positions, part);
    const Matrix<bf16> absent;
    if (inputs == Inputs::side_by_side)
      rms_norm_concat_backward(ctx, d_out, first, second, weight.view(width), rstd[s]->view(positions), d_first,
                               d_second, d_weight.view(width));
    else
      rms_norm_backward(ctx, d_out, first, inputs == Inputs::sum ? second : absent, weight.view(width),
                        rstd[s]->view(positions), d_first, inputs == Inputs::sum ? d_second : absent,
                        d_weight.view(width));
  }

  /// The gradients of the last position, and one weight's, against the plain loop.
  bool gradients_right(Context<cuda>& ctx) const {
    run(ctx, 0);
    const auto first = a[0]->host(), second = b[0]->host(), d = out[0]->host(), d_before = d_a[0]->host();
    const auto d_b_before = d_b[0]->host();
    const auto w = weight.host(), scales = rstd[0]->host(), w_before = d_weight.host();
    run_backward(ctx, 0);
    const auto d_after = d_a[0]->host(), d_b_after = d_b[0]->host();
    const auto w_after = d_weight.host();
    const auto at = [](Index i, Index c, Index cols) { return static_cast<std::size_t>(i * cols + c); };
    const auto u = [&](Index i, Index c) {
      const bool right = inputs == Inputs::side_by_side && c >= part;
      double v = right ? second[at(i, c - part, part)] : first[at(i, c, part)];
      if (inputs == Inputs::sum) v += static_cast<double>(second[at(i, c, part)]);
      return v * scales[static_cast<std::size_t>(i)];
    };
    const Index last = positions - 1;
    double mean = 0, sum = 0, size = 0;
    for (Index c = 0; c < width; ++c) mean += w[at(0, c, 0)] * d[at(last, c, width)] * u(last, c);
    mean /= static_cast<double>(width);
    for (Index c = 0; c < width; ++c) {
      const bool right = inputs == Inputs::side_by_side && c >= part;
      const double d_v = scales[static_cast<std::size_t>(last)] *
                         (static_cast<double>(w[at(0, c, 0)]) * d[at(last, c, width)] - mean * u(last, c));
      const auto place = at(last, right ? c - part : c, part);
      const double wanted = d_v + (right ? d_b_before : d_before)[place], got = (right ? d_b_after : d_after)[place];
      if (!(std::abs(got - wanted) <= 0x1.01p-8 * std::abs(wanted) + 1e-6)) return false;
      if (inputs == Inputs::sum && !(std::abs(d_b_after[place] - d_v) <= 0x1.01p-8 * std::abs(d_v) + 1e-6))
        return false;
    }
    for (Index i = 0; i < positions; ++i) {
      sum += d[at(i, 5, width)] * u(i, 5);
      size += std::abs(d[at(i, 5, width)] * u(i, 5));
    }
    return std::abs(static_cast<double>(w_after[5]) - w_before[5] - sum) <= 1e-6 * size + 1e-6;
  }

  /// d_out, inputs; d_x is read and written, d_t written.
  double gradient_bytes() const {
    return 2.0 * static_cast<double>(positions * width) * (inputs == Inputs::sum ? 6 : 4);
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
  DeviceArray<float> weight, d_weight;
  std::vector<std::unique_ptr<DeviceArray<bf16>>> a, b, out, d_a, d_b;
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

void rms_norm_gradients(benchmark::State& state, Inputs inputs) {
  Context<cuda> ctx;
  const Problem p(ctx, inputs, state.range(0), state.range(1));
  if (!p.gradients_right(ctx)) return state.SkipWithError("rms_norm_backward differs from the plain loop");
  for (Index set = 1; set < p.sets; ++set) p.run(ctx, set);
  time_on_device(state, ctx, p.sets, [&](Index set) { p.run_backward(ctx, set); });
  report_on_device(state, 0, p.gradient_bytes());
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

#define GRADIENTS(name, inputs, width)                \
  BENCHMARK_CAPTURE(rms_norm_gradients, name, inputs) \
      ->Name("rms_norm/" #name "/backward")           \
      ->ArgNames({"positions", "width"})              \
      ->Args({2048, width})                           \
      ->Args({8192, width})                           \
      ->UseManualTime()                               \
      ->Unit(benchmark::kMicrosecond)
GRADIENTS(one, Inputs::one, 3712)->Args({16384, 1024});
GRADIENTS(sum, Inputs::sum, 3712);
GRADIENTS(side_by_side, Inputs::side_by_side, 7424);
