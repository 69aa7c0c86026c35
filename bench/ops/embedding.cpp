// SPDX-License-Identifier: MIT
// embedding: rows copied, and gradients of rows added; bound by memory.
#include <algorithm>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/embedding.hpp>
#include <zamba/random.hpp>

#include "../support/ceilings.hpp"

using namespace zamba;

namespace {

constexpr Index vocabulary = 32000;

std::vector<Token> random_tokens(Index count) {
  Random random(Seed{1});
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (auto& token : tokens) token = static_cast<Token>(random.below(vocabulary));
  return tokens;
}

void embedding_forward(benchmark::State& state) {
  const Index n = state.range(0), d = state.range(1);
  Context<cpu> ctx;
  const auto tokens = random_tokens(n);
  std::vector<float> table(static_cast<std::size_t>(vocabulary * d)), out(static_cast<std::size_t>(n * d));
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i % 1001);
  const Matrix<float> t(table.data(), vocabulary, d), o(out.data(), n, d);
  embedding(ctx, tokens.data(), n, t, o);
  for (Index i = 0; i < n; ++i)
    if (!std::equal(&o(i, 0), &o(i, 0) + d, &t(tokens[static_cast<std::size_t>(i)], 0)))
      state.SkipWithError("embedding differs from the plain loop");
  for (auto _ : state) {
    embedding(ctx, tokens.data(), n, t, o);
    benchmark::ClobberMemory();
  }
  bench::report(state, 0, 2.0 * static_cast<double>(out.size() * sizeof(float)), ctx.threads());
}

void embedding_gradient(benchmark::State& state) {
  const Index n = state.range(0), d = state.range(1);
  Context<cpu> ctx;
  const auto tokens = random_tokens(n);
  std::vector<float> d_table(static_cast<std::size_t>(vocabulary * d)), d_out(static_cast<std::size_t>(n * d), 1.0f);
  const Matrix<float> t(d_table.data(), vocabulary, d), o(d_out.data(), n, d);
  embedding_backward(ctx, tokens.data(), n, o, t);
  for (const Token token : tokens)
    if (t(token, d - 1) != static_cast<float>(std::count(tokens.begin(), tokens.end(), token)))
      state.SkipWithError("embedding_backward differs from the plain loop");
  for (auto _ : state) {
    embedding_backward(ctx, tokens.data(), n, o, t);
    benchmark::ClobberMemory();
  }
  const double elements = static_cast<double>(d_out.size());
  bench::report(state, elements, 3 * elements * sizeof(float), ctx.threads());  // two reads and a write
}

}  // namespace

// 1024 tokens of a hybrid of d 512, and of Zamba-7B (d 3712).
#define SIZES \
  ->ArgNames({"tokens", "d"})->Args({1024, 512})->Args({1024, 3712})->UseRealTime()->Unit(benchmark::kMicrosecond)
BENCHMARK(embedding_forward) SIZES;
BENCHMARK(embedding_gradient) SIZES;
