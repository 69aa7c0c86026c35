// SPDX-License-Identifier: MIT
// gated_rms_norm over 1024 positions: D 1024 in one group (a small hybrid) and 7168 in two (Zamba2-7B).
#include <zamba/ops/gated_rms_norm.hpp>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

constexpr Index positions = 1024;
constexpr double eps = 1e-5;

struct Data {
  Index D, groups;
  std::vector<float> x, z, d_out, out, d_x, d_z, weight, d_weight, rstd;

  explicit Data(const benchmark::State& state)
      : D(state.range(0)),
        groups(state.range(1)),
        x(filled(positions * D, 1)),
        z(filled(positions * D, 2)),
        d_out(filled(positions * D, 3)),
        out(x.size()),
        d_x(x.size()),
        d_z(x.size()),
        weight(filled(D, 4)),
        d_weight(weight.size()),
        rstd(static_cast<std::size_t>(positions * groups)) {}

  static std::vector<float> filled(Index count, std::uint64_t stream) {
    Random random(Seed{1}, stream);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(random.uniform() - 0.5);
    return values;
  }

  Matrix<float> matrix(std::vector<float>& values) const { return {values.data(), positions, D}; }
  Matrix<float> scales() { return {rstd.data(), positions, groups}; }
  Vector<float> vector(std::vector<float>& values) const { return {values.data(), D}; }

  void forward(Context<cpu>& ctx) {
    gated_rms_norm(ctx, matrix(x), matrix(z), vector(weight), eps, matrix(out), scales());
  }
  void backward(Context<cpu>& ctx) {
    gated_rms_norm_backward(ctx, matrix(d_out), matrix(x), matrix(z), vector(weight), scales(), matrix(d_x),
                            matrix(d_z), vector(d_weight));
  }

  /// Whether out is what a plain loop gives.
  bool right() const {
    const auto width = static_cast<std::size_t>(D / groups);
    for (std::size_t first = 0; first < out.size(); first += width) {
      const auto gated = [&](std::size_t i) { return x[i] * static_cast<double>(z[i]) / (1 + std::exp(-z[i])); };
      double squares = 0;
      for (std::size_t i = first; i < first + width; ++i) squares += gated(i) * gated(i);
      const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
      for (std::size_t i = first; i < first + width; ++i)
        if (std::abs(weight[i % static_cast<std::size_t>(D)] * gated(i) * scale - out[i]) > 1e-5) return false;
    }
    return true;
  }
};

void forward(benchmark::State& state) {
  Data data(state);
  Context<cpu> ctx;
  data.forward(ctx);
  if (!data.right()) return state.SkipWithError("differs from a plain loop");
  for (auto _ : state) {
    data.forward(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(positions * data.D);
  bench::report(state, 9 * size, 3 * sizeof(float) * size);  // x, z, out; an exp counts as one operation
}

void backward(benchmark::State& state) {
  Data data(state);
  Context<cpu> ctx;
  data.forward(ctx);
  for (auto _ : state) {
    data.backward(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(positions * data.D);
  bench::report(state, 26 * size, 5 * sizeof(float) * size);  // x, z, d_out, d_x, d_z
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"D", "groups"})->Args({1024, 1})->Args({7168, 2})->UseRealTime();
}

BENCHMARK(forward)->Name("gated_rms_norm/forward")->Apply(sizes);
BENCHMARK(backward)->Name("gated_rms_norm/backward")->Apply(sizes);

}  // namespace
