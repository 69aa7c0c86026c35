// SPDX-License-Identifier: MIT
// rms_norm over 1024 positions: d 512 (a small hybrid) and 3712 (Zamba-7B), and the concatenation of two inputs.
#include <zamba/ops/rms_norm.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

constexpr Index positions = 1024;
constexpr double eps = 1e-5;

struct Data {
  Index d;
  std::vector<float> x, t, d_out, out, d_x, d_t, weight, d_weight, rstd;

  explicit Data(Index d)
      : d(d),
        x(filled(positions * d, 1)),
        t(filled(positions * d, 2)),
        d_out(filled(positions * d, 3)),
        out(x.size()),
        d_x(x.size()),
        d_t(x.size()),
        weight(filled(d, 4)),
        d_weight(weight.size()),
        rstd(positions) {}

  static std::vector<float> filled(Index count, std::uint64_t stream) {
    Random random(Seed{1}, stream);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(random.uniform() - 0.5);
    return values;
  }

  Matrix<float> matrix(std::vector<float>& values) const { return {values.data(), positions, d}; }
  static Vector<float> vector(std::vector<float>& values) { return {values.data(), static_cast<Index>(values.size())}; }

  void forward(Context<cpu>& ctx) {
    rms_norm(ctx, matrix(x), matrix(t), vector(weight), eps, matrix(out), vector(rstd));
  }
  void backward(Context<cpu>& ctx) {
    rms_norm_backward(ctx, matrix(d_out), matrix(x), matrix(t), vector(weight), vector(rstd), matrix(d_x), matrix(d_t),
                      vector(d_weight));
  }

  /// Whether out is what a plain loop gives.
  bool right() const {
    for (Index i = 0; i < positions; ++i) {
      const auto first = static_cast<std::size_t>(i * d);
      double squares = 0;
      for (std::size_t c = 0; c < static_cast<std::size_t>(d); ++c)
        squares += std::pow(static_cast<double>(x[first + c]) + t[first + c], 2);
      const double scale = 1 / std::sqrt(squares / static_cast<double>(d) + eps);
      for (std::size_t c = 0; c < static_cast<std::size_t>(d); ++c)
        if (std::abs(weight[c] * (x[first + c] + t[first + c]) * scale - out[first + c]) > 1e-5) return false;
    }
    return true;
  }
};

void forward(benchmark::State& state) {
  Data data(state.range(0));
  Context<cpu> ctx;
  data.forward(ctx);
  if (!data.right()) return state.SkipWithError("differs from a plain loop");
  for (auto _ : state) {
    data.forward(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(positions * data.d);
  bench::report(state, 5 * size, 3 * sizeof(float) * size);  // x, t, out
}

void concat(benchmark::State& state) {
  Data data(state.range(0));  // its d is the width of both inputs together
  Context<cpu> ctx;
  const Matrix<float> both = data.matrix(data.x);
  for (float& value : data.t) value = 0;
  const auto run = [&] {
    rms_norm_concat(ctx, both.columns(0, data.d / 2), both.columns(data.d / 2, data.d / 2), data.vector(data.weight),
                    eps, data.matrix(data.out), data.vector(data.rstd));
  };
  run();
  if (!data.right()) return state.SkipWithError("differs from a plain loop");
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(positions * data.d);
  bench::report(state, 4 * size, 2 * sizeof(float) * size);  // a and b, out
}

void backward(benchmark::State& state) {
  Data data(state.range(0));
  Context<cpu> ctx;
  data.forward(ctx);
  for (auto _ : state) {
    data.backward(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(positions * data.d);
  bench::report(state, 12 * size, 6 * sizeof(float) * size);  // x, t, d_out, d_x twice, d_t
}

BENCHMARK(forward)->Name("rms_norm/forward")->ArgName("d")->Arg(512)->Arg(3712)->UseRealTime();
BENCHMARK(concat)->Name("rms_norm/concat")->ArgName("2d")->Arg(1024)->Arg(7424)->UseRealTime();
BENCHMARK(backward)->Name("rms_norm/backward")->ArgName("d")->Arg(512)->Arg(3712)->UseRealTime();

}  // namespace
