// SPDX-License-Identifier: MIT
// selective_scan on CUDA in bf16: prompts of Zamba-7B's mixer (D 7424, two heads, N 16), and single tokens of it, one
// and 64 rows; gradients of such prompts. Inputs go in turn with others, so that none of them is in the cache.
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

/// Gradients of `rows` rows of `length` tokens of `channels` channels, which begin from a state.
struct BackwardData {
  Index rows, length, channels, tokens;
  bench::DeviceArray<bf16> u, delta, z, B, C, d_y, d_u, d_delta, d_z, d_B, d_C;
  bench::DeviceArray<float> A_log, skip, bias, state, d_state, checkpoints, d_A_log, d_skip, d_bias;
  Sequences sequences;

  BackwardData(Context<cuda>& ctx, Index rows, Index length, std::uint64_t set, Index channels = D)
      : rows(rows),
        length(length),
        channels(channels),
        tokens(rows * length),
        u(ctx, tokens * channels, 20 * set, 2),
        delta(ctx, tokens * channels, 20 * set + 1, 4),
        z(ctx, tokens * channels, 20 * set + 2, 4),
        B(ctx, tokens * H * N, 20 * set + 3, 2),
        C(ctx, tokens * H * N, 20 * set + 4, 2),
        d_y(ctx, tokens * channels, 20 * set + 5, 2),
        d_u(ctx, tokens * channels, 0),
        d_delta(ctx, tokens * channels, 0),
        d_z(ctx, tokens * channels, 0),
        d_B(ctx, tokens * H * N, 0),
        d_C(ctx, tokens * H * N, 0),
        A_log(ctx, channels * N, 6, 2),
        skip(ctx, channels, 7, 2),
        bias(ctx, channels, 8, 2),
        state(ctx, rows * N * channels, 20 * set + 9, 2),
        d_state(ctx, rows * N * channels, 20 * set + 10, 2),
        checkpoints(ctx, (tokens / scan_chunk + rows) * N * channels, 0),
        d_A_log(ctx, channels * N, 0, 0),
        d_skip(ctx, channels, 0, 0),
        d_bias(ctx, channels, 0, 0) {
    sequences = bench::equal_rows(ctx, rows, length, 1);
    selective_scan(ctx, inputs(), sequences, state.view(rows, N, channels), d_u.view(tokens, channels), kept());
  }

  SelectiveScanInputs<bf16, float> inputs() const {
    return {u.view(tokens, channels), delta.view(tokens, channels), z.view(tokens, channels), B.view(tokens, H, N),
            C.view(tokens, H, N),     A_log.view(channels, N),      skip.view(channels),      bias.view(channels)};
  }
  Tensor<float, 3> kept() const { return checkpoints.view(scan_checkpoint_count(sequences), N, channels); }

  void run(Context<cuda>& ctx) const {
    const SelectiveScanGradients<bf16, float> gradients{
        d_u.view(tokens, channels), d_delta.view(tokens, channels), d_z.view(tokens, channels), d_B.view(tokens, H, N),
        d_C.view(tokens, H, N),     d_A_log.view(channels, N),      d_skip.view(channels),      d_bias.view(channels)};
    selective_scan_backward(ctx, d_y.view(tokens, channels), inputs(), sequences, kept(), gradients,
                            d_state.view(rows, N, channels));
  }
};

/// Whether all gradients are as on the CPU in float: to bf16's 2^-9 of each element, and float's rounding.
bool backward_right(Context<cuda>& ctx, const BackwardData& data) {
  const Index tokens = data.tokens, channels = data.channels, rows = data.rows;
  const auto floats = [](const auto& array) {
    const auto values = array.host();
    return std::vector<float>(values.begin(), values.end());
  };
  const auto u = floats(data.u), delta = floats(data.delta), z = floats(data.z), B = floats(data.B), C = floats(data.C),
             d_y = floats(data.d_y), A_log = floats(data.A_log), skip = floats(data.skip), bias = floats(data.bias),
             checkpoints = floats(data.checkpoints);
  auto d_u = u, d_delta = u, d_z = u, d_B = B, d_C = C, d_state = floats(data.d_state);
  std::vector<float> d_A_log(A_log.size()), d_skip(skip.size()), d_bias(bias.size());
  std::vector<Index> offsets, starts(static_cast<std::size_t>(rows), 1);
  for (Index row = 0; row <= rows; ++row) offsets.push_back(row * data.length);
  const Sequences sequences{offsets.data(), starts.data(), rows, tokens, data.length};
  const auto view = [](auto& values, auto... extents) {
    return Tensor<std::remove_pointer_t<decltype(values.data())>, sizeof...(extents)>(values.data(), extents...);
  };
  const SelectiveScanInputs<float, float> in{
      view(u, tokens, channels), view(delta, tokens, channels), view(z, tokens, channels), view(B, tokens, H, N),
      view(C, tokens, H, N),     view(A_log, channels, N),      view(skip, channels),      view(bias, channels)};
  const SelectiveScanGradients<float, float> gradients{view(d_u, tokens, channels), view(d_delta, tokens, channels),
                                                       view(d_z, tokens, channels), view(d_B, tokens, H, N),
                                                       view(d_C, tokens, H, N),     view(d_A_log, channels, N),
                                                       view(d_skip, channels),      view(d_bias, channels)};
  Context<cpu> host;
  selective_scan_backward(host, view(d_y, tokens, channels), in, sequences,
                          view(checkpoints, scan_checkpoint_count(sequences), N, channels), gradients,
                          view(d_state, rows, N, channels));
  data.run(ctx);
  ctx.synchronize();
  const auto close = [&](const auto& array, const std::vector<float>& wanted, double bound) {
    const auto got = floats(array);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      difference += std::pow(double(got[i]) - wanted[i], 2);
      norm += double(wanted[i]) * wanted[i];
    }
    return std::sqrt(difference / norm) < bound;
  };
  return close(data.d_u, d_u, 0x1p-9) && close(data.d_delta, d_delta, 0x1p-9) && close(data.d_z, d_z, 0x1p-9) &&
         close(data.d_B, d_B, 0x1p-9) && close(data.d_C, d_C, 0x1p-9) && close(data.d_A_log, d_A_log, 1e-5) &&
         close(data.d_skip, d_skip, 1e-5) && close(data.d_bias, d_bias, 1e-5) && close(data.d_state, d_state, 1e-5);
}

void backward(benchmark::State& state) {
  Context<cuda> ctx;
  const Index rows = state.range(0), length = state.range(1);
  const double elements = static_cast<double>(rows * length * D), states = static_cast<double>(rows * D * N);
  const double bytes =
      7 * elements * sizeof(bf16) + elements / scan_chunk * N * sizeof(float) + 2 * states * sizeof(float);
  if (!backward_right(ctx, BackwardData(ctx, 2, 150, 0, 192))) return state.SkipWithError("differs from the CPU");
  bench::time_sets_on_device(state, ctx, bytes,
                             [&](Index set) { return std::make_unique<BackwardData>(ctx, rows, length, set + 1); });
  bench::report_on_device(state, 17 * elements * N, bytes);
}

BENCHMARK(backward)
    ->Name("selective_scan/cuda/backward")
    ->ArgNames({"rows", "tokens"})
    ->Args({1, 2048})
    ->Args({8, 2048})
    ->Args({1, 8192})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
