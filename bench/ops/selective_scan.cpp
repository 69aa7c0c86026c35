// SPDX-License-Identifier: MIT
// selective_scan over 2048 positions, N 16, on 1 and 2 threads: D 1024, 5120 (as ssd has it) and Zamba-7B's D 7424 of
// two heads. `scalar` is the baseline: the same recurrence as a plain loop with std::exp.
#include <zamba/ops/selective_scan.hpp>

#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>
#include <zamba/testing/report.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

constexpr Index N = 16;

struct Data {
  Index D, H, T;
  Context<cpu> ctx;
  std::vector<float> u, delta, z, B, C, A_log, skip, bias, y, state, checkpoints;
  std::vector<float> d_u, d_delta, d_z, d_B, d_C, d_A_log, d_skip, d_bias, d_y;
  std::vector<Index> offsets, starts;

  Data(const benchmark::State& state, Index tokens, Index past)
      : D(state.range(0)),
        H(state.range(1)),
        T(tokens),
        ctx(static_cast<int>(state.range(2))),
        u(filled(T * D, 1, 1)),
        delta(filled(T * D, 2, 1)),
        z(filled(T * D, 3, 2)),
        B(filled(T * H * N, 4, 1)),
        C(filled(T * H * N, 5, 1)),
        A_log(filled(D * N, 6, 1)),
        skip(filled(D, 7, 1)),
        bias(filled(D, 8, 0.5)),
        y(u.size()),
        state(filled(N * D, 9, 1)),
        offsets{0, T},
        starts{past} {
    for (float& value : bias) value -= 3;  // dt near 0.05
    checkpoints.resize(static_cast<std::size_t>(scan_checkpoint_count(sequences()) * N * D));
    d_y = filled(T * D, 10, 1);
    d_u = d_delta = d_z = u;
    d_B = d_C = B;
    d_A_log = A_log;
    d_skip = d_bias = skip;
  }

  static std::vector<float> filled(Index count, std::uint64_t stream, double scale) {
    Random random(Seed{1}, stream);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(scale * (2 * random.uniform() - 1));
    return values;
  }

  Sequences sequences() const { return {offsets.data(), starts.data(), 1, T, T}; }
  SelectiveScanInputs<float, float> inputs() const {
    return {{u.data(), T, D},    {delta.data(), T, D}, {z.data(), T, D}, {B.data(), T, H, N},
            {C.data(), T, H, N}, {A_log.data(), D, N}, {skip.data(), D}, {bias.data(), D}};
  }
  Tensor<float, 3> kept() { return {checkpoints.data(), scan_checkpoint_count(sequences()), N, D}; }

  void forward(Tensor<float, 3> keep = {}) {
    selective_scan(ctx, inputs(), sequences(), Tensor<float, 3>(state.data(), 1, N, D), Matrix<float>(y.data(), T, D),
                   keep);
  }
  void backward() {
    const SelectiveScanGradients<float, float> gradients{
        {d_u.data(), T, D},    {d_delta.data(), T, D}, {d_z.data(), T, D}, {d_B.data(), T, H, N},
        {d_C.data(), T, H, N}, {d_A_log.data(), D, N}, {d_skip.data(), D}, {d_bias.data(), D}};
    selective_scan_backward(ctx, Matrix<const float>(d_y.data(), T, D), inputs(), sequences(), kept(), gradients);
  }

  /// The recurrence as one would write it down, position after position, from a zero state; each thread has a part of
  /// the channels.
  void scalar(std::vector<float>& out) {
    ctx.parallel_for(ctx.threads(), [&](Index part, int) {
      const Index first = part * D / ctx.threads(), last = (part + 1) * D / ctx.threads();
      std::vector<float> A(at((last - first) * N)), s(A.size());
      for (std::size_t i = 0; i < A.size(); ++i) A[i] = -std::exp(A_log[at(first * N) + i]);
      for (Index t = 0; t < T; ++t)
        for (Index c = first; c < last; ++c) {
          const float x = u[at(t * D + c)], gate = z[at(t * D + c)];
          const float dt = std::log1p(std::exp(delta[at(t * D + c)] + bias[at(c)]));
          const Index head = c / (D / H);
          const float *B_t = &B[at((t * H + head) * N)], *C_t = &C[at((t * H + head) * N)];
          const float* A_c = &A[at((c - first) * N)];
          float* s_c = &s[at((c - first) * N)];
          float sum = skip[at(c)] * x;
          for (Index n = 0; n < N; ++n) {
            s_c[n] = std::exp(dt * A_c[n]) * s_c[n] + dt * x * B_t[n];
            sum += C_t[n] * s_c[n];
          }
          out[at(t * D + c)] = sum * gate / (1 + std::exp(-gate));
        }
    });
  }

  /// Whether the plain loop gives the same, by norm: float's eps of 6e-8 times the root of some hundred roundings.
  bool right() {
    forward();
    std::vector<float> wanted(y.size());
    scalar(wanted);
    return testing::relative_error(y, wanted) <= 2e-6;
  }

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
};

/// Per position, channel and n: dt A, exp, decay s + dt u B, y + C s; an exp counts as one operation. Activations are
/// read and written once.
void report(benchmark::State& state, const Data& data, double operations, double activations) {
  const double td = static_cast<double>(data.T * data.D), bc = static_cast<double>(2 * data.T * data.H * N);
  bench::report(state, operations * td * N, (activations * td + bc) * sizeof(float), data.ctx.threads());
}

void forward(benchmark::State& state) {
  if (!Data(state, 150, 0).right()) return state.SkipWithError("differs from the plain loop");
  Data data(state, 2048, 0);
  for (auto _ : state) {
    data.forward();
    benchmark::ClobberMemory();
  }
  report(state, data, 6, 4);
}

void scalar(benchmark::State& state) {
  Data data(state, 2048, 0);
  for (auto _ : state) {
    data.scalar(data.y);
    benchmark::ClobberMemory();
  }
  report(state, data, 6, 4);
}

void backward(benchmark::State& state) {
  Data data(state, 2048, 0);
  data.forward(data.kept());
  for (auto _ : state) {
    data.backward();
    benchmark::ClobberMemory();
  }
  report(state, data, 18, 7);  // the forward recurrence again, and two products for each of its own
}

void step(benchmark::State& state) {
  Data data(state, 1, 1);
  for (auto _ : state) {
    data.forward();
    benchmark::ClobberMemory();
  }
  // The state is read and written, A_log read.
  const double dn = static_cast<double>(data.D * N);
  bench::report(state, 6 * dn, 3 * dn * sizeof(float), data.ctx.threads());
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"D", "H", "threads"})->ArgsProduct({{1024, 5120}, {1}, {1, 2}})->ArgsProduct({{7424}, {2}, {1, 2}});
  b->UseRealTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK(scalar)
    ->Name("selective_scan/scalar")
    ->ArgNames({"D", "H", "threads"})
    ->ArgsProduct({{1024}, {1}, {1, 2}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(forward)->Name("selective_scan/forward")->Apply(sizes);
BENCHMARK(backward)->Name("selective_scan/backward")->Apply(sizes);
BENCHMARK(step)->Name("selective_scan/step")->Apply(sizes);

}  // namespace
