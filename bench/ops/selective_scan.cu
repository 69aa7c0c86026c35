// SPDX-License-Identifier: MIT
// selective_scan on CUDA in bf16: prompts of Zamba-7B's mixer (D 7424, two heads, N 16), and single tokens of it, one
// and 64 rows. Inputs go in turn with others, so that none of them is in the cache.
#include <zamba/ops/selective_scan.cuh>

#include <cmath>
#include <memory>
#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

constexpr Index D = 7424, H = 2, N = 16;

/// The inputs of `rows` rows of `length` tokens, which continue from a state.
struct Data {
  Index rows, length, tokens;
  bench::DeviceArray<bf16> u, delta, z, B, C, y;
  bench::DeviceArray<float> A_log, skip, bias, state;
  Sequences sequences;

  Data(Context<cuda>& ctx, Index rows, Index length, std::uint64_t set)
      : rows(rows),
        length(length),
        tokens(rows * length),
        u(ctx, tokens * D, 10 * set, 2),
        delta(ctx, tokens * D, 10 * set + 1, 4),
        z(ctx, tokens * D, 10 * set + 2, 4),
        B(ctx, tokens * H * N, 10 * set + 3, 2),
        C(ctx, tokens * H * N, 10 * set + 4, 2),
        y(ctx, tokens * D, 10 * set + 5),
        A_log(ctx, D * N, 6, 2),
        skip(ctx, D, 7, 2),
        bias(ctx, D, 8, 2),
        state(ctx, rows * N * D, 10 * set + 9, 2) {
    sequences = bench::equal_rows(ctx, rows, length, 1);
  }

  void run(Context<cuda>& ctx) const {
    const SelectiveScanInputs<bf16, float> in{u.view(tokens, D),    delta.view(tokens, D), z.view(tokens, D),
                                              B.view(tokens, H, N), C.view(tokens, H, N),  A_log.view(D, N),
                                              skip.view(D),         bias.view(D)};
    selective_scan(ctx, in, sequences, state.view(rows, N, D), y.view(tokens, D));
  }

  /// Whether some channels of the first and last row are as on the host in double, to bf16's 2^-9 of each output and
  /// float's rounding of the others of its size.
  bool right(Context<cuda>& ctx) const {
    const auto s0 = state.host(), A = A_log.host(), skips = skip.host(), biases = bias.host();
    const auto us = u.host(), deltas = delta.host(), zs = z.host(), Bs = B.host(), Cs = C.host();
    run(ctx);
    ctx.synchronize();
    const auto ys = y.host();
    const auto s1 = state.host();
    double difference = 0, norm = 0, state_difference = 0, state_norm = 0;
    for (const Index row : {Index{0}, rows - 1})
      for (const Index c : {Index{0}, Index{37}, D / 2 - 1, D / 2, D - 1}) {
        double s[N];
        for (Index n = 0; n < N; ++n) s[n] = s0[at((row * N + n) * D + c)];
        for (Index t = row * length; t < (row + 1) * length; ++t) {
          const double x = us[at(t * D + c)], gate = zs[at(t * D + c)];
          const double dt = std::log1p(std::exp(double(deltas[at(t * D + c)]) + biases[at(c)]));
          double sum = skips[at(c)] * x;
          for (Index n = 0; n < N; ++n) {
            const std::size_t i = at((t * H + c / (D / H)) * N + n);
            s[n] = std::exp(-dt * std::exp(double(A[at(c * N + n)]))) * s[n] + dt * x * Bs[i];
            sum += s[n] * Cs[i];
          }
          const double wanted = sum * gate / (1 + std::exp(-gate));
          difference += std::pow(ys[at(t * D + c)] - wanted, 2);
          norm += wanted * wanted;
        }
        for (Index n = 0; n < N; ++n) {
          state_difference += std::pow(s1[at((row * N + n) * D + c)] - s[n], 2);
          state_norm += s[n] * s[n];
        }
      }
    return std::sqrt(difference / norm) < 0x1p-8 && std::sqrt(state_difference / state_norm) < 3e-6;
  }

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
};

void forward(benchmark::State& state) {
  Context<cuda> ctx;
  const Index rows = state.range(0), length = state.range(1);
  const double elements = static_cast<double>(rows * length * D), states = static_cast<double>(rows * D * N);
  const double bytes = 4 * elements * sizeof(bf16) + 2 * states * sizeof(float);
  if (!Data(ctx, rows, std::min<Index>(length, 150), 0).right(ctx)) return state.SkipWithError("differs from the host");
  bench::time_sets_on_device(state, ctx, bytes,
                             [&](Index set) { return std::make_unique<Data>(ctx, rows, length, set + 1); });
  bench::report_on_device(state, 6 * elements * N, bytes);
}

BENCHMARK(forward)
    ->Name("selective_scan/cuda/forward")
    ->ArgNames({"rows", "tokens"})
    ->Args({1, 512})
    ->Args({1, 2048})
    ->Args({1, 8192})
    ->Args({8, 2048})
    ->Args({1, 1})
    ->Args({8, 1})
    ->Args({64, 1})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
