// SPDX-License-Identifier: MIT
// attention of one row: 8 heads of 128 (a small hybrid), 16 heads of 464 (Zamba-7B); prefill and training over 1024
// tokens, and decode of one token against a cache of 4096, in float and bf16.
#include <zamba/ops/attention.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

namespace {

using namespace zamba;

/// One row of `tokens` after `past` cached positions; without a cache where past is 0.
template <class S>
struct Data {
  AttentionShape shape;
  Index tokens, past, width, offsets[2], starts[1];
  std::vector<float> q, k, v, d_out, out, lse, d_q, d_k, d_v;
  std::vector<S> cache_k, cache_v;

  Data(Index heads, Index head_dim, Index tokens, Index past)
      : shape{heads, heads, head_dim, 1 / std::sqrt(static_cast<double>(head_dim))},
        tokens(tokens),
        past(past),
        width(heads * head_dim),
        offsets{0, tokens},
        starts{past},
        q(filled<float>(tokens * width, 1)),
        k(filled<float>(tokens * width, 2)),
        v(filled<float>(tokens * width, 3)),
        d_out(filled<float>(tokens * width, 4)),
        out(q.size()),
        lse(static_cast<std::size_t>(tokens * heads)),
        d_q(q.size()),
        d_k(k.size()),
        d_v(v.size()),
        cache_k(filled<S>(past > 0 ? (past + tokens) * width : 0, 5)),
        cache_v(filled<S>(past > 0 ? (past + tokens) * width : 0, 6)) {}

  template <class T>
  static std::vector<T> filled(Index count, std::uint64_t stream) {
    Random random(Seed{1}, stream);
    std::vector<T> values(static_cast<std::size_t>(count));
    for (T& value : values) value = T(static_cast<float>(random.uniform() - 0.5));
    return values;
  }

  Sequences sequences() const { return {offsets, starts, 1, tokens, tokens}; }
  Matrix<float> matrix(std::vector<float>& values) const { return {values.data(), tokens, width}; }
  Tensor<S, 3> cache(std::vector<S>& values) const {
    return past > 0 ? Tensor<S, 3>(values.data(), 1, past + tokens, width) : Tensor<S, 3>{};
  }

  void forward(Context<cpu>& ctx) {
    attention(ctx, shape, matrix(q), matrix(k), matrix(v), sequences(), cache(cache_k), cache(cache_v), matrix(out),
              Matrix<float>(lse.data(), tokens, shape.heads));
  }
  void backward(Context<cpu>& ctx) {
    attention_backward(ctx, shape, matrix(d_out), matrix(q), matrix(k), matrix(v), sequences(), cache(cache_k),
                       cache(cache_v), matrix(out), Matrix<float>(lse.data(), tokens, shape.heads), matrix(d_q),
                       matrix(d_k), matrix(d_v), {}, {});
  }

  float key(const std::vector<float>& own, const std::vector<S>& cached, Index j, Index column) const {
    const auto at = static_cast<std::size_t>(j * width + column);
    return past > 0 ? static_cast<float>(cached[at]) : own[at];
  }

  /// Whether the last token's output is what a plain loop gives.
  bool right() const {
    const Index last = tokens - 1, head_dim = shape.head_dim;
    for (Index head = 0; head < shape.heads; ++head) {
      std::vector<double> sums(static_cast<std::size_t>(head_dim));
      double total = 0;
      for (Index j = 0; j <= past + last; ++j) {
        double score = 0;
        for (Index c = head * head_dim; c < (head + 1) * head_dim; ++c)
          score += q[static_cast<std::size_t>(last * width + c)] * key(k, cache_k, j, c);
        const double p = std::exp(shape.scale * score);
        total += p;
        for (Index c = 0; c < head_dim; ++c)
          sums[static_cast<std::size_t>(c)] += p * key(v, cache_v, j, head * head_dim + c);
      }
      for (Index c = 0; c < head_dim; ++c)
        if (std::abs(sums[static_cast<std::size_t>(c)] / total -
                     out[static_cast<std::size_t>(last * width + head * head_dim + c)]) > 1e-5)
          return false;
    }
    return true;
  }

  /// Of one product over the causal half.
  double product_flops() const {
    const double pairs =
        static_cast<double>(tokens) * (static_cast<double>(past) + 0.5 * static_cast<double>(tokens + 1));
    return 2 * pairs * static_cast<double>(width);
  }
};

template <class S>
void forward(benchmark::State& state) {
  Data<S> data(state.range(0), state.range(1), state.range(2), state.range(3));
  Context<cpu> ctx;
  data.forward(ctx);
  if (!data.right()) return state.SkipWithError("differs from a plain loop");
  for (auto _ : state) {
    data.forward(ctx);
    benchmark::ClobberMemory();
  }
  const double read = static_cast<double>(2 * (data.past + data.tokens) * data.width) * sizeof(S);  // k, v
  const double own = static_cast<double>(4 * data.tokens * data.width) * sizeof(float);             // q, k, v, out
  bench::report(state, 2 * data.product_flops(), data.past > 0 ? read + own : own);
}

void backward(benchmark::State& state) {
  Data<float> data(state.range(0), state.range(1), state.range(2), 0);
  Context<cpu> ctx;
  data.forward(ctx);
  for (auto _ : state) {
    data.backward(ctx);
    benchmark::ClobberMemory();
  }
  bench::report(state, 5 * data.product_flops(), static_cast<double>(8 * data.tokens * data.width) * sizeof(float));
}

const std::vector<std::string> names = {"heads", "head_dim", "tokens", "past"};
BENCHMARK(forward<float>)
    ->Name("attention/forward")
    ->ArgNames(names)
    ->Args({8, 128, 1024, 0})
    ->Args({16, 464, 1024, 0})
    ->UseRealTime();
BENCHMARK(backward)
    ->Name("attention/backward")
    ->ArgNames({"heads", "head_dim", "tokens"})
    ->Args({8, 128, 1024})
    ->Args({16, 464, 1024})
    ->UseRealTime();
BENCHMARK(forward<float>)
    ->Name("attention/decode/float")
    ->ArgNames(names)
    ->Args({8, 128, 1, 4095})
    ->Args({16, 464, 1, 4095})
    ->UseRealTime();
BENCHMARK(forward<bf16>)
    ->Name("attention/decode/bf16")
    ->ArgNames(names)
    ->Args({8, 128, 1, 4095})
    ->Args({16, 464, 1, 4095})
    ->UseRealTime();

}  // namespace
