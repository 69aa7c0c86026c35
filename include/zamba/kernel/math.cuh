// SPDX-License-Identifier: MIT
// Functions by approximate instructions of one thread, and the rounding of two values to bf16 at once.
#pragma once

#include <zamba/device.hpp>

namespace zamba::kernel {

/// Two values as one register of a fragment, `low` first, each rounded to nearest even.
__device__ inline unsigned pack_bf16(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// exp(x) is 2 to the power of x times it.
inline constexpr float log2_e = 1.44269504f;

/// 2^x, within 2 units in the last place.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x, within 1 unit in the last place; 0 for an infinite x.
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / (1 + e^-x), in float within (3 + |x|) 1e-7 of its value.
__device__ inline float sigmoid(float x) { return reciprocal_approximate(1.0f + exp2_approximate(x * -log2_e)); }
__device__ inline double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }

/// x / (1 + e^-x), likewise.
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline double silu(double x) { return x / (1 + ::exp(-x)); }

/// The derivative of silu, from the sigmoid of x.
template <class F>
__device__ F silu_slope(F x, F gate) {
  return gate * ::fma(x, F(1) - gate, F(1));
}

}  // namespace zamba::kernel
