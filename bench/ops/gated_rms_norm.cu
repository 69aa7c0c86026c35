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
  bench::DeviceArray<bf16> x, z, out;
  bench::DeviceArray<float> weight, rstd;

  Data(Context<cuda>& ctx, Index tokens, Index D, Index groups)
      : tokens(tokens),
        D(D),
        groups(groups),
        sets(bench::sets_beyond_cache(bytes())),
        x(ctx, sets * tokens * D, 1),
        z(ctx, sets * tokens * D, 2, 4),
        out(ctx, sets * tokens * D, 3),
        weight(ctx, D, 4),
        rstd(ctx, tokens * groups, 5) {}

  /// x, z, out.
  double bytes() const { return 3.0 * sizeof(bf16) * static_cast<double>(tokens * D); }

  Matrix<bf16> of_set(const bench::DeviceArray<bf16>& array, Index set) const {
    return array.view(sets * tokens, D).slice(set * tokens, tokens);
  }
  void forward(Context<cuda>& ctx, Index set) const {
    gated_rms_norm<cuda, bf16>(ctx, of_set(x, set), of_set(z, set), weight.view(D), eps, of_set(out, set),
                               rstd.view(tokens, groups));
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
