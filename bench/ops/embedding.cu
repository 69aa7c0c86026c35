// SPDX-License-Identifier: MIT
// embedding on CUDA in bf16, compared with the copy's bandwidth.
#include <cmath>
#include <set>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/ops/embedding.cuh>

#include "../support/device.cuh"

using namespace zamba;
using namespace zamba::bench;

namespace {

void embed(benchmark::State& state) {
  Context<cuda> ctx;
  constexpr Index vocabulary = 32000, width = 3712;
  const Index count = state.range(0);
  const DeviceArray<bf16> table(ctx, vocabulary * width, 1), out(ctx, count * width, 2);
  std::vector<Token> ids;
  for (Index t = 0; t < count; ++t) ids.push_back(static_cast<Token>(t * 7919 % vocabulary));
  ArenaScope scope(ctx.arena());
  const Token* const tokens = ctx.readable(ids.data(), count);
  const auto run = [&](Index) { embedding(ctx, tokens, count, table.view(vocabulary, width), out.view(count, width)); };
  run(0);
  const auto rows = table.host(), got = out.host();
  for (Index t = 0; t < count; ++t)
    for (Index c = 0; c < width; ++c)
      if (got[static_cast<std::size_t>(t * width + c)].bits !=
          rows[static_cast<std::size_t>(Index{ids[static_cast<std::size_t>(t)]} * width + c)].bits)
        return state.SkipWithError("embedding differs from the table");
  time_on_device(state, ctx, 1, run);
  report_on_device(state, 0, 4.0 * static_cast<double>(count * width));
}

enum class Tokens { distinct, zipf, one };

/// The k-th most frequent of them about 1/k times as often as the first, as words of a text.
std::vector<Token> tokens_of(Tokens kind, Index count, Index vocabulary) {
  std::vector<Token> ids;
  for (Index t = 0; t < count; ++t) {
    const Index place = t * 7919 % count;  // in [0, count), each once
    const double share = (static_cast<double>(place) + 0.5) / static_cast<double>(count);
    const Index id = kind == Tokens::distinct ? place * 31 % vocabulary
                     : kind == Tokens::zipf   ? static_cast<Index>(std::pow(static_cast<double>(vocabulary), share)) - 1
                                              : 17;
    ids.push_back(static_cast<Token>(id));
  }
  return ids;
}

void embed_backward(benchmark::State& state, Tokens kind) {
  Context<cuda> ctx;
  constexpr Index vocabulary = 32000, width = 3712;
  const Index count = state.range(0);
  const DeviceArray<bf16> d_out(ctx, count * width, 1);
  const DeviceArray<float> d_table(ctx, vocabulary * width, 2);
  const auto ids = tokens_of(kind, count, vocabulary);
  ArenaScope scope(ctx.arena());
  const Token* const tokens = ctx.readable(ids.data(), count);
  const auto run = [&](Index) {
    embedding_backward(ctx, tokens, count, d_out.view(count, width), d_table.view(vocabulary, width));
  };
  auto wanted = d_table.host();
  run(0);
  const auto rows = d_out.host();
  const auto got = d_table.host();
  // Of sums of up to `count` numbers below 1: float sums by 64 of them.
  const double tolerance = static_cast<double>(count) * 1e-6;
  for (Index c = 0; c < width; c += 97) {
    for (Index t = 0; t < count; ++t)
      wanted[static_cast<std::size_t>(Index{ids[static_cast<std::size_t>(t)]} * width + c)] +=
          rows[static_cast<std::size_t>(t * width + c)];
    for (Index v = 0; v < vocabulary; ++v) {
      const auto at = static_cast<std::size_t>(v * width + c);
      if (!(std::abs(got[at] - wanted[at]) <= tolerance))
        return state.SkipWithError("embedding_backward differs from the plain loop");
    }
  }
  time_on_device(state, ctx, 1, run);
  const auto different = static_cast<double>(std::set<Token>(ids.begin(), ids.end()).size());
  report_on_device(state, 0, 2.0 * static_cast<double>(count * width) + 8.0 * different * static_cast<double>(width));
}

}  // namespace

BENCHMARK(embed)->ArgName("tokens")->Arg(1)->Arg(64)->Arg(8192)->UseManualTime()->Unit(benchmark::kMicrosecond);
#define COUNTS ->ArgName("tokens")->Arg(8192)->Arg(65536)->UseManualTime()->Unit(benchmark::kMicrosecond)
BENCHMARK_CAPTURE(embed_backward, distinct, Tokens::distinct)->Name("embedding/backward/distinct") COUNTS;
BENCHMARK_CAPTURE(embed_backward, zipf, Tokens::zipf)->Name("embedding/backward/zipf") COUNTS;
BENCHMARK_CAPTURE(embed_backward, one, Tokens::one)->Name("embedding/backward/one") COUNTS;
