// SPDX-License-Identifier: MIT
// gated_rms_norm in bf16 on CUDA: a prefill and one token of Zamba2-2.7B (D 5120, one group) and of Zamba2-7B (7168,
// two groups).
#include <zamba/ops/gated_rms_norm.cuh>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

struct Data {
  static constexpr double eps = 1e-5;
  Index tokens, D, groups, sets;
  bench::DeviceArray<bf16> x, z, out, d_x, d_z;
  bench::DeviceArray<float> weight, rstd, d_weight;

  Data(Context<cuda>& ctx, Index tokens, Index D, Index groups)
      : tokens(tokens),
        D(D),
        groups(groups),
        sets(bench::sets_beyond_cache(bytes())),
        x(ctx, sets * tokens * D, 1),
        z(ctx, sets * tokens * D, 2, 4),
        out(ctx, sets * tokens * D, 3),
        d_x(ctx, sets * tokens * D, 6),
        d_z(ctx, sets * tokens * D, 7),
        weight(ctx, D, 4),
        rstd(ctx, tokens * groups, 5),
        d_weight(ctx, D, 8) {}

  /// x, z, out.
  double bytes() const { return 3.0 * sizeof(bf16) * static_cast<double>(tokens * D); }

  Matrix<bf16> of_set(const bench::DeviceArray<bf16>& array, Index set) const {
    return array.view(sets * tokens, D).slice(set * tokens, tokens);
  }
  void forward(Context<cuda>& ctx, Index set) const {
    gated_rms_norm<cuda, bf16>(ctx, of_set(x, set), of_set(z, set), weight.view(D), eps, of_set(out, set),
                               rstd.view(tokens, groups));
  }

  /// Of `out` as the gradient that comes in.
  void backward(Context<cuda>& ctx, Index set) const {
    gated_rms_norm_backward<cuda, bf16>(ctx, of_set(out, set), of_set(x, set), of_set(z, set), weight.view(D),
                                        rstd.view(tokens, groups), of_set(d_x, set), of_set(d_z, set),
                                        d_weight.view(D));
  }

  /// Whether the gradients of the last position are what a plain loop gives, to the rounding of 8 bits, and what is
  /// added to that of one weight.
  bool gradients_right(Context<cuda>& ctx) const {
    forward(ctx, 0);
    const auto d = out.host();
    const auto before = d_weight.host();
    backward(ctx, 0);
    const auto x_ = x.host(), z_ = z.host(), d_x_ = d_x.host(), d_z_ = d_z.host();
    const auto w = weight.host(), after = d_weight.host(), scales = rstd.host();
    const Index width = D / groups;
    const auto at = [&](Index i, Index c) { return static_cast<std::size_t>(i * D + c); };
    const auto gate = [&](std::size_t i) { return 1 / (1 + std::exp(-static_cast<double>(z_[i]))); };
    const auto u = [&](Index i, Index c) {
      const auto place = at(i, c);
      return x_[place] * static_cast<double>(z_[place]) * gate(place) *
             scales[static_cast<std::size_t>(i * groups + c / width)];
    };
    const Index last = tokens - 1;
    const auto near = [](double got, double wanted) {
      return std::abs(got - wanted) <= 0x1.01p-8 * std::abs(wanted) + 1e-6;
    };
    for (Index first = 0; first < D; first += width) {
      double mean = 0;
      for (Index c = first; c < first + width; ++c) mean += w[at(0, c)] * d[at(last, c)] * u(last, c);
      mean /= static_cast<double>(width);
      for (Index c = first; c < first + width; ++c) {
        const auto place = at(last, c);
        const double d_v = scales[static_cast<std::size_t>(last * groups + c / width)] *
                           (static_cast<double>(w[at(0, c)]) * d[place] - mean * u(last, c));
        const double z_c = z_[place], g = gate(place);
        if (!near(d_x_[place], d_v * z_c * g) || !near(d_z_[place], d_v * x_[place] * g * (1 + z_c * (1 - g))))
          return false;
      }
    }
    double sum = 0, size = 0;
    for (Index i = 0; i < tokens; ++i) {
      sum += d[at(i, 5)] * u(i, 5);
      size += std::abs(d[at(i, 5)] * u(i, 5));
    }
    return std::abs(static_cast<double>(after[5]) - before[5] - sum) <= 1e-6 * size + 1e-6;
  }

  /// Whether the last position is what a plain loop gives, to half a unit in the last place of 8 bits.
  bool right(Context<cuda>& ctx) const {
    forward(ctx, 0);
    const auto last = [&](const bench::DeviceArray<bf16>& array) {
      std::vector<bf16> values(static_cast<std::size_t>(D));
      Memory<cuda>::copy_to_host(values.data(), &of_set(array, 0)(tokens - 1, 0), values.size() * sizeof(bf16));
      return values;
    };
    const std::vector<bf16> x_ = last(x), z_ = last(z), out_ = last(out);
    const std::vector<float> w = weight.host();
    const Index width = D / groups;
    for (Index first = 0; first < D; first += width) {
      const auto gated = [&](Index i) { return x_[i] * static_cast<double>(z_[i]) / (1 + std::exp(-z_[i])); };
      double squares = 0;
      for (Index i = first; i < first + width; ++i) squares += gated(i) * gated(i);
      const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
      for (Index i = first; i < first + width; ++i) {
        const double wanted = w[i] * gated(i) * scale;
        if (!(std::abs(out_[i] - wanted) <= 0x1.01p-8 * std::abs(wanted) + 1e-30)) return false;
      }
    }
    return true;
  }
};

void forward(benchmark::State& state) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2));
  if (!data.right(ctx)) return state.SkipWithError("differs from a plain loop");
  bench::time_on_device(state, ctx, data.sets, [&](Index set) { data.forward(ctx, set); });
  bench::report_on_device(state, 9 * static_cast<double>(data.tokens * data.D), data.bytes());
}

void backward(benchmark::State& state) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2));
  if (!data.gradients_right(ctx)) return state.SkipWithError("differs from a plain loop");
  bench::time_on_device(state, ctx, data.sets, [&](Index set) { data.backward(ctx, set); });
  // x, z, d_out, d_x, d_z
  bench::report_on_device(state, 25 * static_cast<double>(data.tokens * data.D), data.bytes() / 3 * 5);
}

BENCHMARK(backward)
    ->Name("gated_rms_norm/backward")
    ->ArgNames({"tokens", "D", "groups"})
    ->Args({8192, 2048, 1})
    ->Args({8192, 5120, 1})
    ->Args({8192, 7168, 2})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

BENCHMARK(forward)
    ->Name("gated_rms_norm/forward")
    ->ArgNames({"tokens", "D", "groups"})
    ->Args({1, 5120, 1})
    ->Args({64, 5120, 1})
    ->Args({8192, 5120, 1})
    ->Args({8192, 7168, 2})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
