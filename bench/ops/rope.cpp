// SPDX-License-Identifier: MIT
// rope over 1024 positions: the queries of a small transformer (8 heads of 64) and of Llama-2-7B (32 of 128), and one
// token of the latter.
#include <zamba/ops/rope.hpp>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

struct Data {
  Index tokens;
  RopeShape shape;
  std::vector<float> x;
  std::vector<Index> offsets, starts{1024};

  Data(const benchmark::State& state, Index tokens)
      : tokens(tokens),
        shape{state.range(0), state.range(1), 10000},
        x(static_cast<std::size_t>(tokens * width())),
        offsets{0, tokens} {
    Random random(Seed{1}, 1);
    for (float& value : x) value = static_cast<float>(random.normal());
  }

  Index width() const { return shape.heads * shape.head_dim; }
  void run(Context<cpu>& ctx) {
    rope(ctx, shape, {offsets.data(), starts.data(), 1, tokens, tokens}, Matrix<float>(x.data(), tokens, width()));
  }

  /// Whether run() gives what a plain loop gives.
  bool right(Context<cpu>& ctx) {
    const std::vector<float> before = x;
    run(ctx);
    const Index half = shape.head_dim / 2;
    for (Index t = 0; t < tokens; ++t)
      for (Index head = 0; head < shape.heads; ++head)
        for (Index i = 0; i < half; ++i) {
          const double frequency = std::pow(shape.theta, -static_cast<double>(i) / static_cast<double>(half));
          const double angle = static_cast<double>(starts[0] + t) * frequency;
          const auto a = static_cast<std::size_t>(t * width() + head * shape.head_dim + i),
                     b = a + static_cast<std::size_t>(half);
          if (std::abs(before[a] * std::cos(angle) - before[b] * std::sin(angle) - x[a]) > 1e-5) return false;
          if (std::abs(before[b] * std::cos(angle) + before[a] * std::sin(angle) - x[b]) > 1e-5) return false;
        }
    return true;
  }
};

void turn(benchmark::State& state, Index tokens) {
  Data data(state, tokens);
  Context<cpu> ctx;
  if (!data.right(ctx)) return state.SkipWithError("differs from a plain loop");
  for (auto _ : state) {
    data.run(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(data.x.size());
  bench::report(state, 3 * size, 2 * sizeof(float) * size);  // two products and a sum; read and written
}

void forward(benchmark::State& state) { turn(state, 1024); }
void step(benchmark::State& state) { turn(state, 1); }

BENCHMARK(forward)
    ->Name("rope/forward")
    ->ArgNames({"heads", "head_dim"})
    ->Args({8, 64})
    ->Args({32, 128})
    ->UseRealTime();
BENCHMARK(step)->Name("rope/step")->ArgNames({"heads", "head_dim"})->Args({32, 128})->UseRealTime();

}  // namespace
