// SPDX-License-Identifier: MIT
// ssd over 2048 positions on 1 and 2 threads: D 1024 and Zamba2-2.7B's 5120, heads of 64, N 64, one group.
// `recurrence` is the baseline: the same sums position after position, vectorised over channels. selective_scan/forward
// has the same D, with its N of 16.
#include <zamba/ops/ssd.hpp>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

constexpr Index N = 64, P = 64, G = 1;

struct Data {
  Index D, H, T;
  Context<cpu> ctx;
  std::vector<float> u, delta, B, C, A_log, skip, bias, y, state, checkpoints;
  std::vector<float> d_u, d_delta, d_B, d_C, d_A_log, d_skip, d_bias, d_y;
  std::vector<Index> offsets, starts;

  Data(const benchmark::State& state, Index tokens, Index past)
      : D(state.range(0)),
        H(D / P),
        T(tokens),
        ctx(static_cast<int>(state.range(1))),
        u(filled(T * D, 1, 1)),
        delta(filled(T * H, 2, 1)),
        B(filled(T * G * N, 3, 1)),
        C(filled(T * G * N, 4, 1)),
        A_log(filled(H, 5, 1)),
        skip(filled(H, 6, 1)),
        bias(filled(H, 7, 0.5)),
        y(u.size()),
        state(filled(N * D, 8, 1)),
        offsets{0, T},
        starts{past} {
    for (float& value : bias) value -= 3;  // dt near 0.05
    checkpoints.resize(static_cast<std::size_t>(ssd_checkpoint_count(sequences()) * N * D));
    d_y = filled(T * D, 9, 1);
    d_u = u;
    d_delta = delta;
    d_B = d_C = B;
    d_A_log = d_skip = d_bias = skip;
  }

  static std::vector<float> filled(Index count, std::uint64_t stream, double scale) {
    Random random(Seed{1}, stream);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(scale * (2 * random.uniform() - 1));
    return values;
  }

  Sequences sequences() const { return {offsets.data(), starts.data(), 1, T, T}; }
  SsdInputs<float, float> inputs() const {
    return {{u.data(), T, D},  {delta.data(), T, H}, {B.data(), T, G, N}, {C.data(), T, G, N},
            {A_log.data(), H}, {skip.data(), H},     {bias.data(), H}};
  }
  Tensor<float, 3> kept() { return {checkpoints.data(), ssd_checkpoint_count(sequences()), N, D}; }

  void forward(Tensor<float, 3> keep = {}) {
    ssd(ctx, inputs(), sequences(), Tensor<float, 3>(state.data(), 1, N, D), Matrix<float>(y.data(), T, D), keep);
  }
  /// Chunks of one position: the recurrence.
  void recurrence() {
    ssd(ctx, inputs(), sequences(), Tensor<float, 3>(state.data(), 1, N, D), Matrix<float>(y.data(), T, D), {}, 1);
  }
  void backward() {
    const SsdGradients<float, float> gradients{{d_u.data(), T, D},    {d_delta.data(), T, H}, {d_B.data(), T, G, N},
                                               {d_C.data(), T, G, N}, {d_A_log.data(), H},    {d_skip.data(), H},
                                               {d_bias.data(), H}};
    ssd_backward(ctx, Matrix<const float>(d_y.data(), T, D), inputs(), sequences(), kept(), gradients);
  }

  /// The definition as one would write it down, from a zero state.
  void scalar(std::vector<float>& out) const {
    std::vector<float> s(at(D * N));
    for (Index t = 0; t < T; ++t)
      for (Index c = 0; c < D; ++c) {
        const std::size_t head = at(c / P);
        const float x = u[at(t * D + c)], dt = std::log1p(std::exp(delta[at(t * H) + head] + bias[head]));
        const float decay = std::exp(-dt * std::exp(A_log[head]));
        float sum = skip[head] * x;
        for (Index n = 0; n < N; ++n) {
          float& s_n = s[at(c * N + n)];
          s_n = decay * s_n + dt * x * B[at(t * N + n)];
          sum += C[at(t * N + n)] * s_n;
        }
        out[at(t * D + c)] = sum;
      }
  }

  /// Whether the plain loop gives the same, by norm: float's eps of 6e-8 times the root of some hundred roundings.
  bool right() {
    forward();
    std::vector<float> wanted(y.size());
    scalar(wanted);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      difference += std::pow(static_cast<double>(y[i]) - wanted[i], 2);
      norm += std::pow(static_cast<double>(wanted[i]), 2);
    }
    return std::sqrt(difference / norm) <= 2e-6;
  }

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
};

/// The recurrence's operations: per position, channel and n decay s + dt u B, and y + C s. Activations are read and
/// written once.
void report(benchmark::State& state, const Data& data, double operations, double activations) {
  const double td = static_cast<double>(data.T * data.D), bc = static_cast<double>(2 * data.T * G * N);
  bench::report(state, operations * td * N, (activations * td + bc) * sizeof(float), data.ctx.threads());
}

void forward(benchmark::State& state) {
  if (!Data(state, 150, 0).right()) return state.SkipWithError("differs from the plain loop");
  Data data(state, 2048, 0);
  for (auto _ : state) {
    data.forward();
    benchmark::ClobberMemory();
  }
  report(state, data, 5, 2);
}

void recurrence(benchmark::State& state) {
  Data data(state, 2048, 0);
  for (auto _ : state) {
    data.recurrence();
    benchmark::ClobberMemory();
  }
  report(state, data, 5, 2);
}

void backward(benchmark::State& state) {
  Data data(state, 2048, 0);
  data.forward(data.kept());
  for (auto _ : state) {
    data.backward();
    benchmark::ClobberMemory();
  }
  report(state, data, 15, 3);
}

void step(benchmark::State& state) {
  Data data(state, 1, 1);
  for (auto _ : state) {
    data.forward();
    benchmark::ClobberMemory();
  }
  // The state is read and written.
  const double dn = static_cast<double>(data.D * N);
  bench::report(state, 5 * dn, 2 * dn * sizeof(float), data.ctx.threads());
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"D", "threads"})->ArgsProduct({{1024, 5120}, {1, 2}})->UseRealTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK(recurrence)->Name("ssd/recurrence")->Apply(sizes);
BENCHMARK(forward)->Name("ssd/forward")->Apply(sizes);
BENCHMARK(backward)->Name("ssd/backward")->Apply(sizes);
BENCHMARK(step)->Name("ssd/step")->Apply(sizes);

}  // namespace
