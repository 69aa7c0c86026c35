// SPDX-License-Identifier: MIT
// ssd in bf16 on CUDA: prefill, its backward pass and one token of Zamba2-2.7B's heads (80 of 64, N 64) and of
// Mamba2-1.3B's (64 of 64, N 128), with one group.
#include <zamba/ops/ssd.cuh>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

constexpr Index P = 64;

/// `rows` rows of `tokens`, with states of a past where there is one. Several sets, used in turn.
struct Data {
  Index rows, tokens, H, N, D, all, sets;
  bool past;
  bench::DeviceArray<bf16> u, delta, B, C, y;
  bench::DeviceArray<float> A_log, skip, bias, state;
  Sequences sequences;

  Data(Context<cuda>& ctx, Index rows, Index tokens, Index heads, Index N, bool past)
      : rows(rows),
        tokens(tokens),
        H(heads),
        N(N),
        D(heads * P),
        all(rows * tokens),
        sets(bench::sets_beyond_cache(bytes(past))),
        past(past),
        u(ctx, sets * all * D, 1),
        delta(ctx, sets * all * H, 2, 2),
        B(ctx, sets * all * N, 3),
        C(ctx, sets * all * N, 4),
        y(ctx, sets * all * D, 5),
        A_log(ctx, H, 6),
        skip(ctx, H, 7),
        bias(ctx, H, 8),
        state(ctx, sets * rows * N * D, 9),
        sequences(bench::equal_rows(ctx, rows, tokens, past ? 1 : 0)) {
    ctx.fill(bias.view(H), -4.0f);  // dt near 0.02
  }

  /// u, delta, B, C and y once; the state is read where there is a past, and written.
  double bytes(bool with_past) const {
    return static_cast<double>(2 * all * (2 * D + H + 2 * N) + 4 * rows * N * D * (with_past ? 2 : 1));
  }
  /// The recurrence's: decay s + dt u B, and y + C s.
  double flops() const { return 5.0 * static_cast<double>(all * D * N); }

  template <class T>
  Matrix<T> of_set(const bench::DeviceArray<T>& array, Index set, Index cols) const {
    return array.view(sets * all, cols).slice(set * all, all);
  }
  Tensor<float, 3> states(Index set) const { return state.view(sets * rows, N, D).slice(set * rows, rows); }
  SsdInputs<bf16, float> inputs(Index set) const {
    return {of_set(u, set, D),
            of_set(delta, set, H),
            split_heads<const bf16>(of_set(B, set, N), 1),
            split_heads<const bf16>(of_set(C, set, N), 1),
            A_log.view(H),
            skip.view(H),
            bias.view(H)};
  }
  void forward(Context<cuda>& ctx, Index set, Tensor<float, 3> keep = {}) const {
    ssd(ctx, inputs(set), sequences, states(set), of_set(y, set, D), keep);
  }

  template <class T>
  static std::vector<T> host(const T* from, Index count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    Memory<cuda>::copy_to_host(values.data(), from, values.size() * sizeof(T));
    return values;
  }

  /// Whether two channels of the last row are the definition's, y and state, by norm to the roundings of bf16.
  bool right(Context<cuda>& ctx) const {
    const Index at = all - tokens;
    const auto before = host(states(0)[rows - 1].data, N * D);
    forward(ctx, 0);
    const auto got = host(&of_set(y, 0, D)(at, 0), tokens * D), u_ = host(&of_set(u, 0, D)(at, 0), tokens * D),
               delta_ = host(&of_set(delta, 0, H)(at, 0), tokens * H), B_ = host(&of_set(B, 0, N)(at, 0), tokens * N),
               C_ = host(&of_set(C, 0, N)(at, 0), tokens * N);
    const auto after = host(states(0)[rows - 1].data, N * D), A_ = A_log.host(), skip_ = skip.host(),
               bias_ = bias.host();
    double y_difference = 0, y_norm = 0, s_difference = 0, s_norm = 0;
    for (const Index c : {Index{5}, D - 2}) {
      const Index head = c / P;
      std::vector<double> s(static_cast<std::size_t>(N));
      for (Index n = 0; n < N; ++n) s[n] = past ? before[n * D + c] : 0;
      for (Index t = 0; t < tokens; ++t) {
        const double dt = std::log1p(std::exp(double(delta_[t * H + head]) + bias_[head])), x = u_[t * D + c];
        const double decay = std::exp(-dt * std::exp(double(A_[head])));
        double sum = skip_[head] * x;
        for (Index n = 0; n < N; ++n) {
          s[n] = decay * s[n] + dt * x * B_[t * N + n];
          sum += s[n] * C_[t * N + n];
        }
        y_difference += std::pow(got[t * D + c] - sum, 2);
        y_norm += sum * sum;
      }
      for (Index n = 0; n < N; ++n) {
        s_difference += std::pow(after[n * D + c] - s[n], 2);
        s_norm += s[n] * s[n];
      }
    }
    return std::sqrt(y_difference / y_norm) < 0x1p-7 && std::sqrt(s_difference / s_norm) < 0x1p-7;
  }
};

/// The backward pass of one set, from the states that a forward pass kept.
struct Gradients {
  const Data& data;
  bench::DeviceArray<bf16> d_y, d_u, d_delta, d_B, d_C;
  bench::DeviceArray<float> d_A_log, d_skip, d_bias, checkpoints;

  Gradients(Context<cuda>& ctx, const Data& data)
      : data(data),
        d_y(ctx, data.all * data.D, 10),
        d_u(ctx, data.all * data.D, 11),
        d_delta(ctx, data.all * data.H, 12),
        d_B(ctx, data.all * data.N, 13),
        d_C(ctx, data.all * data.N, 14),
        d_A_log(ctx, data.H, 15),
        d_skip(ctx, data.H, 16),
        d_bias(ctx, data.H, 17),
        checkpoints(ctx, kept() * data.N * data.D, 18) {
    data.forward(ctx, 0, states());
  }

  Index kept() const { return ssd_checkpoint_count(data.sequences); }
  Tensor<float, 3> states() const { return checkpoints.view(kept(), data.N, data.D); }
  void run(Context<cuda>& ctx) const {
    const SsdGradients<bf16, float> gradients{d_u.view(data.all, data.D),
                                              d_delta.view(data.all, data.H),
                                              d_B.view(data.all, Index{1}, data.N),
                                              d_C.view(data.all, Index{1}, data.N),
                                              d_A_log.view(data.H),
                                              d_skip.view(data.H),
                                              d_bias.view(data.H)};
    ssd_backward(ctx, d_y.view(data.all, data.D), data.inputs(0), data.sequences, states(), gradients);
  }

  /// u, d_y, delta, B, C and the states once, the gradients of the former once.
  double bytes() const {
    return static_cast<double>(2 * data.all * (3 * data.D + 2 * data.H + 4 * data.N) + 4 * kept() * data.N * data.D);
  }

  /// Columns of the last row's tokens in the first set.
  std::vector<double> columns(const bench::DeviceArray<bf16>& array, Index all, Index first, Index count) const {
    const auto values = Data::host(array.view(array.size()).data + (data.all - data.tokens) * all, data.tokens * all);
    std::vector<double> part;
    for (Index t = 0; t < data.tokens; ++t)
      for (Index c = first; c < first + count; ++c) part.push_back(static_cast<double>(values[t * all + c]));
    return part;
  }

  /// Whether the gradients of u and delta of a head of the last row are those of the CPU, by norm to the roundings of
  /// bf16.
  bool right(Context<cuda>& ctx) const {
    run(ctx);
    const Index T = data.tokens, N = data.N, head = data.H - 2;
    auto u = columns(data.u, data.D, head * P, P), delta = columns(data.delta, data.H, head, 1),
         B = columns(data.B, N, 0, N), C = columns(data.C, N, 0, N), dy = columns(d_y, data.D, head * P, P);
    double A_log = data.A_log.host()[head], skip = data.skip.host()[head], bias = data.bias.host()[head];
    std::vector<double> y(u.size()), du(u.size()), d_d(delta.size()), dB(B.size()), dC(C.size()), rest(3);
    const Index offsets[] = {0, T};
    const Sequences row{offsets, nullptr, 1, T, T};
    const Index count = ssd_checkpoint_count(row);
    std::vector<double> states_(static_cast<std::size_t>(count * N * P));
    const Tensor<double, 3> states(states_.data(), count, N, P);
    const SsdInputs<double, double> in{{u.data(), T, P}, {delta.data(), T, 1}, {B.data(), T, 1, N}, {C.data(), T, 1, N},
                                       {&A_log, 1},      {&skip, 1},           {&bias, 1}};
    const SsdGradients<double, double> out{{du.data(), T, P},    {d_d.data(), T, 1}, {dB.data(), T, 1, N},
                                           {dC.data(), T, 1, N}, {&rest[0], 1},      {&rest[1], 1},
                                           {&rest[2], 1}};
    Context<cpu> host(1);
    ssd(host, in, row, {}, Matrix<double>(y.data(), T, P), states);
    ssd_backward(host, Matrix<const double>(dy.data(), T, P), in, row, states, out);
    const auto error = [](const std::vector<double>& got, const std::vector<double>& wanted) {
      double difference = 0, norm = 0;
      for (std::size_t i = 0; i < wanted.size(); ++i) {
        difference += std::pow(got[i] - wanted[i], 2);
        norm += wanted[i] * wanted[i];
      }
      return std::sqrt(difference / norm);
    };
    return error(columns(d_u, data.D, head * P, P), du) < 0x1p-7 &&
           error(columns(d_delta, data.H, head, 1), d_d) < 0x1p-7;
  }
};

void run(benchmark::State& state, bool past) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2), state.range(3), past);
  if (!data.right(ctx)) return state.SkipWithError("differs from the definition");
  bench::time_on_device(state, ctx, data.sets, [&](Index set) { data.forward(ctx, set); });
  bench::report_on_device(state, data.flops(), data.bytes(past));
}

void prefill(benchmark::State& state) { run(state, false); }
void step(benchmark::State& state) { run(state, true); }

void backward(benchmark::State& state) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2), state.range(3), false);
  const Gradients gradients(ctx, data);
  if (!gradients.right(ctx)) return state.SkipWithError("differs from the CPU");
  // What it moves is more than the L2 cache holds.
  bench::time_on_device(state, ctx, 1, [&](Index) { gradients.run(ctx); });
  bench::report_on_device(state, 3 * data.flops(), gradients.bytes());
}

void settings(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "tokens", "H", "N"})->UseManualTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK(prefill)
    ->Name("ssd/prefill")
    ->Apply(settings)
    ->Args({1, 512, 80, 64})
    ->Args({1, 2048, 80, 64})
    ->Args({1, 8192, 80, 64})
    ->Args({8, 2048, 80, 64})
    ->Args({1, 8192, 64, 128})
    ->Args({8, 2048, 64, 128});
BENCHMARK(backward)
    ->Name("ssd/backward")
    ->Apply(settings)
    ->Args({1, 2048, 80, 64})
    ->Args({1, 8192, 80, 64})
    ->Args({8, 2048, 80, 64})
    ->Args({1, 8192, 64, 128})
    ->Args({8, 2048, 64, 128});
BENCHMARK(step)
    ->Name("ssd/step")
    ->Apply(settings)
    ->Args({1, 1, 80, 64})
    ->Args({64, 1, 80, 64})
    ->Args({1, 8, 80, 64})
    ->Args({1, 9, 80, 64})
    ->Args({1, 64, 80, 64})
    ->Args({64, 1, 64, 128});

}  // namespace
