// SPDX-License-Identifier: MIT
// cross_entropy on CUDA in bf16, with the head: three products, compared with cuBLAS on large squares.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/cross_entropy.cuh>

#include "../support/device.cuh"

using namespace zamba;
using namespace zamba::bench;

namespace {

struct Problem {
  Problem(Context<cuda>& ctx, Index positions, Index width, Index vocabulary)
      : n(positions),
        d(width),
        V(vocabulary),
        h(ctx, n * d, 1),
        head(ctx, V * d, 2),
        d_h(ctx, n * d, 3),
        d_head(ctx, V * d, 4),
        there(static_cast<std::size_t>(n) * sizeof(Token)) {
    for (Index t = 0; t < n; ++t) targets.push_back(static_cast<Token>(t % distinct * 7919 % V));
    Memory<cuda>::copy_from_host(there.data(), targets.data(), there.size());
  }

  LossSum run(Context<cuda>& ctx) const {
    return cross_entropy_backward(ctx, h.view(n, d), head.view(V, d), reinterpret_cast<const Token*>(there.data()),
                                  scale(), d_h.view(n, d), d_head.view(V, d));
  }
  LossSum forward(Context<cuda>& ctx) const {
    return cross_entropy(ctx, h.view(n, d), head.view(V, d), reinterpret_cast<const Token*>(there.data()));
  }

  /// For positions that repeat every `distinct` ones: the loss, and some of the gradients, as plain loops in double
  /// give them, of logits that are rounded to bf16. As bounds: 2^-9 of d_logits where they are written, and as much of
  /// d_h.
  bool right(Context<cuda>& ctx) const {
    for (Index t = distinct; t < n; t += distinct)
      ctx.copy(h.view(n, d).slice(0, std::min(distinct, n - t)), h.view(n, d).slice(t, std::min(distinct, n - t)));
    ctx.zero(d_head.view(V, d));
    const LossSum loss = run(ctx);
    const auto hs = h.host(), weights = head.host(), of_h = d_h.host();
    const auto of_head = d_head.host();
    std::vector<double> z(static_cast<std::size_t>(distinct * V));
    double wanted = 0;
    for (Index t = 0; t < distinct; ++t) {
      double* const row = z.data() + t * V;
      Context<cpu> host;
      host.parallel_for(V, [&](Index v, int) {
        const bf16 *a = hs.data() + t * d, *b = weights.data() + v * d;
        double sum = 0;
        for (Index k = 0; k < d; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
        row[v] = bf16(static_cast<float>(sum));
      });
      double sum = 0;
      for (Index v = 0; v < V; ++v) sum += std::exp(row[v]);
      const Token target = targets[static_cast<std::size_t>(t)];
      wanted += (std::log(sum) - row[target]) * static_cast<double>(n / distinct);
      for (Index v = 0; v < V; ++v) row[v] = scale() * (std::exp(row[v]) / sum - (v == target));
    }
    Errors h_error, head_error;
    for (Index k = 0; k < d; k += 97) {
      for (Index t = 0; t < distinct; ++t) {
        double sum = 0;
        for (Index v = 0; v < V; ++v)
          sum += z[static_cast<std::size_t>(t * V + v)] *
                 static_cast<double>(weights[static_cast<std::size_t>(v * d + k)]);
        h_error.add(static_cast<double>(of_h[static_cast<std::size_t>((n - distinct + t) * d + k)]), sum);
      }
      for (Index v = 0; v < V; v += 97) {
        double sum = 0;
        for (Index t = 0; t < distinct; ++t)
          sum += z[static_cast<std::size_t>(t * V + v)] * static_cast<double>(hs[static_cast<std::size_t>(t * d + k)]);
        head_error.add(static_cast<double>(of_head[static_cast<std::size_t>(v * d + k)]),
                       sum * static_cast<double>(n / distinct));
      }
    }
    return loss.count == n && std::abs(loss.sum - wanted) <= 1e-4 * wanted && h_error.within(0x1p-8) &&
           head_error.within(0x1p-8);
  }

  double flops() const { return 6.0 * static_cast<double>(n) * static_cast<double>(d * V); }

 private:
  struct Errors {
    double squares = 0, all = 0;
    void add(double got, double wanted) { squares += (got - wanted) * (got - wanted), all += wanted * wanted; }
    bool within(double bound) const { return squares <= bound * bound * all; }
  };
  static constexpr Index distinct = 2;
  double scale() const { return 1 / static_cast<double>(n); }

  Index n, d, V;
  DeviceArray<bf16> h, head, d_h;
  DeviceArray<float> d_head;
  std::vector<Token> targets;
  Buffer<cuda> there;
};

void cross_entropy_both(benchmark::State& state, bool gradient) {
  Context<cuda> ctx;
  const Index n = state.range(0), d = state.range(1), V = state.range(2);
  if (!Problem(ctx, n, d, V).right(ctx)) return state.SkipWithError("cross_entropy differs from plain loops");
  const Problem p(ctx, n, d, V);
  time_on_device(
      state, ctx, 1, [&](Index) { benchmark::DoNotOptimize(gradient ? p.run(ctx) : p.forward(ctx)); }, 3);
  report_on_device(state, gradient ? p.flops() : p.flops() / 3, 0);
}

}  // namespace

// The head of Zamba-7B, one of d 2048, and that with a vocabulary that is no multiple of 8.
#define SIZES(...) ->ArgNames({"positions", "d", "V"})->__VA_ARGS__->UseManualTime()->Unit(benchmark::kMicrosecond)
BENCHMARK_CAPTURE(cross_entropy_both, forward, false)->Name("cross_entropy/forward") SIZES(Args({8192, 3712, 32000}));
BENCHMARK_CAPTURE(cross_entropy_both, backward, true)
    ->Name("cross_entropy/backward")
        SIZES(Args({8192, 3712, 32000})->Args({8192, 2048, 32000})->Args({8192, 2048, 50257}));
