// SPDX-License-Identifier: MIT
// rope in bf16 on CUDA: queries of Llama-2-7B (32 heads of 128), of a prefill and of one token.
#include <zamba/ops/rope.cuh>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

struct Data {
  static constexpr Index past = 1024;
  RopeShape shape;
  Index tokens, width, sets;
  bench::DeviceArray<bf16> x;
  Sequences sequences;

  Data(Context<cuda>& ctx, Index tokens, Index heads, Index head_dim)
      : shape{heads, head_dim, 10000},
        tokens(tokens),
        width(heads * head_dim),
        sets(bench::sets_beyond_cache(bytes())),
        x(ctx, sets * tokens * width, 1),
        sequences(bench::equal_rows(ctx, 1, tokens, past)) {}

  /// Read and written.
  double bytes() const { return 2.0 * sizeof(bf16) * static_cast<double>(tokens * width); }

  Matrix<bf16> of_set(Index set) const { return x.view(sets * tokens, width).slice(set * tokens, tokens); }
  void turn(Context<cuda>& ctx, Index set) const { rope(ctx, shape, sequences, of_set(set)); }

  std::vector<bf16> last_token() const {
    std::vector<bf16> values(static_cast<std::size_t>(width));
    Memory<cuda>::copy_to_host(values.data(), &of_set(0)(tokens - 1, 0), values.size() * sizeof(bf16));
    return values;
  }
  /// Whether the last token is turned as a plain loop turns it, to half a unit in the last place of 8 bits.
  bool right(Context<cuda>& ctx) const {
    const std::vector<bf16> before = last_token();
    turn(ctx, 0);
    const std::vector<bf16> after = last_token();
    const Index half = shape.head_dim / 2;
    const auto near = [](double got, double wanted) {
      return std::abs(got - wanted) <= 0x1p-8 * std::abs(wanted) + 1e-6;
    };
    for (Index head = 0; head < shape.heads; ++head)
      for (Index i = 0; i < half; ++i) {
        const double angle = static_cast<double>(past + tokens - 1) *
                             std::pow(shape.theta, -static_cast<double>(i) / static_cast<double>(half));
        const Index a = head * shape.head_dim + i, b = a + half;
        if (!near(after[a], before[a] * std::cos(angle) - before[b] * std::sin(angle))) return false;
        if (!near(after[b], before[b] * std::cos(angle) + before[a] * std::sin(angle))) return false;
      }
    return true;
  }
};

void turn(benchmark::State& state) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2));
  if (!data.right(ctx)) return state.SkipWithError("differs from a plain loop");
  bench::time_on_device(state, ctx, data.sets, [&](Index set) { data.turn(ctx, set); });
  bench::report_on_device(state, 3 * static_cast<double>(data.tokens * data.width), data.bytes());
}

BENCHMARK(turn)
    ->Name("rope/turn")
    ->ArgNames({"tokens", "heads", "head_dim"})
    ->Args({1, 32, 128})
    ->Args({8192, 32, 128})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
