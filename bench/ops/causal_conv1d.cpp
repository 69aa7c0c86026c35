// SPDX-License-Identifier: MIT
// causal_conv1d of width 4 over one row: D 1024 (a small hybrid) and 7424 (Zamba-7B), and one token of decode.
#include <zamba/ops/causal_conv1d.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

constexpr Index K = 4;

struct Data {
  Index D, tokens, offsets[2], starts[1] = {K};  // the row has a past
  std::vector<float> x, d_out, out, d_x, weight, d_weight, bias, d_bias, initial, state, d_state;

  Data(Index D, Index tokens)
      : D(D),
        tokens(tokens),
        offsets{0, tokens},
        x(filled(tokens * D, 1)),
        d_out(filled(tokens * D, 2)),
        out(x.size()),
        d_x(x.size()),
        weight(filled(D * K, 3)),
        d_weight(weight.size()),
        bias(filled(D, 4)),
        d_bias(bias.size()),
        initial(filled((K - 1) * D, 5)),
        state(initial),
        d_state(initial) {}

  static std::vector<float> filled(Index count, std::uint64_t stream) {
    Random random(Seed{1}, stream);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(random.uniform() - 0.5);
    return values;
  }

  Sequences sequences() const { return {offsets, starts, 1, tokens, tokens}; }
  Matrix<float> matrix(std::vector<float>& values) const { return {values.data(), tokens, D}; }
  Tensor<float, 3> states(std::vector<float>& values) const { return {values.data(), 1, K - 1, D}; }

  void forward(Context<cpu>& ctx) {
    causal_conv1d(ctx, matrix(x), Matrix<float>(weight.data(), D, K), Vector<float>(bias.data(), D), sequences(),
                  states(state), matrix(out));
  }
  void backward(Context<cpu>& ctx) {
    causal_conv1d_backward(ctx, matrix(d_out), matrix(x), Matrix<float>(weight.data(), D, K),
                           Vector<float>(bias.data(), D), sequences(), states(initial), matrix(d_x),
                           Matrix<float>(d_weight.data(), D, K), Vector<float>(d_bias.data(), D), states(d_state));
  }

  /// Whether out, computed from the initial state, is what a plain loop gives.
  bool right() const {
    for (Index t = 0; t < tokens; ++t)
      for (Index c = 0; c < D; ++c) {
        double p = bias[static_cast<std::size_t>(c)];
        for (Index j = 0; j < K; ++j) {
          const Index at = t - (K - 1) + j;
          const double input = at >= 0 ? x[static_cast<std::size_t>(at * D + c)]
                                       : initial[static_cast<std::size_t>((K - 1 + at) * D + c)];
          p += weight[static_cast<std::size_t>(c * K + j)] * input;
        }
        if (std::abs(p / (1 + std::exp(-p)) - out[static_cast<std::size_t>(t * D + c)]) > 1e-5) return false;
      }
    return true;
  }
};

void forward(benchmark::State& state) {
  Data data(state.range(0), state.range(1));
  Context<cpu> ctx;
  data.forward(ctx);
  if (!data.right()) return state.SkipWithError("differs from a plain loop");
  for (auto _ : state) {
    data.forward(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(data.tokens * data.D);
  bench::report(state, (2 * K + 4) * size, 2 * sizeof(float) * size);  // x, out
}

void backward(benchmark::State& state) {
  Data data(state.range(0), state.range(1));
  Context<cpu> ctx;
  for (auto _ : state) {
    data.backward(ctx);
    benchmark::ClobberMemory();
  }
  const double size = static_cast<double>(data.tokens * data.D);
  bench::report(state, (6 * K + 8) * size, 3 * sizeof(float) * size);  // x, d_out, d_x
}

BENCHMARK(forward)
    ->Name("causal_conv1d/forward")
    ->ArgNames({"D", "tokens"})
    ->Args({1024, 1024})
    ->Args({7424, 1024})
    ->Args({1024, 1})
    ->Args({7424, 1})
    ->UseRealTime();
BENCHMARK(backward)
    ->Name("causal_conv1d/backward")
    ->ArgNames({"D", "tokens"})
    ->Args({1024, 1024})
    ->Args({7424, 1024})
    ->UseRealTime();

}  // namespace
