// SPDX-License-Identifier: MIT
#include <zamba/ops/gated_activation.cuh>

#include <bit>
#include <cstdint>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>, On<cuda, bf16>
#include "gated_activation.cpp"

namespace {

TEST_CASE("gated_activation in bf16: every gate from -9 to 9, and far ones") {
  Values gates;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto value = static_cast<double>(std::bit_cast<bf16>(static_cast<std::uint16_t>(bits)));
    if (std::abs(value) <= 9 && std::abs(value) >= 0x1p-100) gates.push_back(value);
  }
  const std::size_t near = gates.size();
  gates.insert(gates.end(), {-1e30, -100, 100, 1e30, 0});
  gates.resize((gates.size() + 7) / 8 * 8);
  const auto count = static_cast<Index>(gates.size());
  Context<cuda> ctx;
  const Array<cuda, bf16> gate(gates), up(Values(gates.size(), 1.0)), out(gates), d_gate(gates), d_up(gates);
  for (Activation activation : both) {
    CAPTURE(static_cast<int>(activation));
    gated_activation(ctx, activation, gate.view(1, count), up.view(1, count), out.view(1, count));
    gated_activation_backward(ctx, activation, up.view(1, count), gate.view(1, count), up.view(1, count),
                              d_gate.view(1, count), d_up.view(1, count));
    const Values got = out.values(), slopes = d_gate.values();
    CHECK(d_up.values() == got);
    for (std::size_t i = 0; i < near; ++i) {  // half a unit in the last place of 8 bits, and float's own rounding
      const double exact = activate(activation, gates[i]);
      REQUIRE(std::abs(got[i] - exact) <= 0x1.001p-8 * std::abs(exact));
      // Of the slope, which has a zero, besides a few roundings of values up to 1.13.
      const double exact_slope = slope(activation, gates[i]);
      REQUIRE(std::abs(slopes[i] - exact_slope) <= 0x1.001p-8 * std::abs(exact_slope) + 4e-7);
    }
    for (const auto& [far, limit] : {std::pair{near, 0.0}, {near + 1, 0.0}, {near + 2, 1.0}, {near + 3, 1.0}})
      CHECK(slopes[far] == doctest::Approx(limit).epsilon(1e-12));
    CHECK(slopes[near + 4] == 0.5);
    CHECK(got[near] == 0);
    CHECK(std::abs(got[near + 1]) < 1e-30);
    CHECK(got[near + 2] == 100);
    CHECK(got[near + 3] == gate.values()[near + 3]);
    CHECK(got[near + 4] == 0);
  }
}

}  // namespace
