// SPDX-License-Identifier: MIT
// embedding on CUDA in bf16, compared with the copy's bandwidth.
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

}  // namespace

BENCHMARK(embed)->ArgName("tokens")->Arg(1)->Arg(64)->Arg(8192)->UseManualTime()->Unit(benchmark::kMicrosecond);
