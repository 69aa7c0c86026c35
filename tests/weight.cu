// SPDX-License-Identifier: MIT
// A weight type with kernels of its own on CUDA: linear, its heads, and embedding against the CPU.
#include <zamba/context.cuh>

#include <cstdint>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/embedding.cuh>
#include <zamba/ops/linear.cuh>
#include <zamba/testing/report.hpp>

#include <tests/support/arrays.hpp>
#include <tests/support/scaled.cuh>

using namespace zamba;
using namespace zamba::testing;
using namespace zamba_test;

namespace {

using Int8 = Scaled<std::int8_t>;

/// (heads, out, in) as (heads out, in) and as heads, in the device's memory.
template <class Device>
struct Weights {
  Buffer<Device> memory;
  Weight<const Int8> all;
  Weight<const Int8, 3> heads;

  Weights(const std::vector<double>& values, Index count, Index out, Index in)
      : memory(detail::weight_bytes<Int8>(count * out * in, in)) {
    std::vector<std::byte> bytes(memory.size());
    detail::encode_rows<Int8>(values.data(), count * out * in, in, bytes.data());
    Memory<Device>::copy_from_host(memory.data(), bytes.data(), bytes.size());
    all = {memory.data(), count * out, in};
    heads = {memory.data(), count, out, in};
  }
};

template <class Device, class A>
std::vector<double> products(Index tokens) {
  const Index count = 2, out = 12, in = 21;
  Context<Device> ctx;
  const Weights<Device> weight(normal_values(count * out * in, 1), count, out, in);
  const Array<Device, A> x(normal_values(tokens * count * in, 2)), residual(normal_values(tokens * count * out, 3));
  const Array<Device, float> bias(normal_values(count * out, 4));
  const Array<Device, A> y(Values(static_cast<std::size_t>(tokens * count * out)));
  const Array<Device, A> by_head(Values(static_cast<std::size_t>(tokens * count * out))),
      rows(Values(static_cast<std::size_t>(tokens * in)));
  const Array<Device, Token> ids(Values(static_cast<std::size_t>(tokens), 17));
  linear(ctx, x.view(tokens, in), weight.all, y.view(tokens, count * out), residual.view(tokens, count * out),
         bias.view(count * out));
  linear_heads(ctx, x.view(tokens, count, in), weight.heads, by_head.view(tokens, count, out));
  embedding(ctx, ids.view(tokens).data, tokens, weight.all, rows.view(tokens, in));
  Values values = y.values();
  for (const auto& more : {by_head.values(), rows.values()}) values.insert(values.end(), more.begin(), more.end());
  return values;
}

TEST_CASE("weight: a type with kernels of its own gives on CUDA what it gives on the CPU") {
  for (const Index tokens : {1, 3, 40}) {
    const Values wanted = products<cpu, float>(tokens);
    CHECK(relative_error(products<cuda, float>(tokens), wanted) < 1e-6);
    CHECK(relative_error(products<cuda, bf16>(tokens), wanted) < 2 * 0x1p-9);
  }
}

}  // namespace
