// SPDX-License-Identifier: MIT
// What the kernels of selective_scan on CUDA share: the arithmetic of a step in float, and which channels a block
// takes.
#pragma once

#include <zamba/kernel/math.cuh>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// log(1 + exp(x)) = max(x, 0) + log(1 + w), w = exp(-|x|) is given; log(1 + w) / w by a polynomial, within 2e-7.
__device__ inline float scan_softplus_of(float x, float w) {
  float p = 0.00523269409f;
  p = ::fmaf(p, w, -0.0295052379f);
  p = ::fmaf(p, w, 0.0782259479f);
  p = ::fmaf(p, w, -0.136632457f);
  p = ::fmaf(p, w, 0.191060066f);
  p = ::fmaf(p, w, -0.24842982f);
  p = ::fmaf(p, w, 0.333190978f);
  p = ::fmaf(p, w, -0.499994934f);
  p = ::fmaf(p, w, 0.99999994f);
  return ::fmaf(p, w, x > 0 ? x : 0.0f);
}
__device__ inline float scan_softplus(float x) { return scan_softplus_of(x, exp2_approximate(::fabsf(x) * -log2_e)); }

/// The same, and its derivative 1 / (1 + exp(-x)).
__device__ inline float scan_softplus(float x, float& slope) {
  const float w = exp2_approximate(::fabsf(x) * -log2_e);
  slope = reciprocal_approximate(1.0f + w) * (x > 0 ? 1.0f : w);
  return scan_softplus_of(x, w);
}

/// 1 / (1 + e^-x), the derivative of softplus.
__device__ inline float scan_sigmoid(float x) { return reciprocal_approximate(1.0f + exp2_approximate(x * -log2_e)); }

/// (sum + skip u) silu(z)
__device__ inline float scan_output(float sum, float skip, float u, float z) { return ::fmaf(skip, u, sum) * silu(z); }

/// -exp(A_log) log2(e): the decay is 2 to the power of dt times it. Finite, so that dt = 0 is no decay.
__device__ inline float scan_decay(float A_log) {
  constexpr float least = -3.4e38f;
  const float a = -::expf(A_log) * log2_e;
  return a < least ? least : a;
}

/// One step of States states, and the sum of C s over them: each four in order, then these by pairs.
template <int States>
__device__ float scan_step(float dt, float dt_u, const float (&B)[States], const float (&C)[States],
                           const float (&a)[States], float (&s)[States]) {
  static_assert(States % 4 == 0, "zamba: a thread has a multiple of four states");
  float sums[States / 4];
#pragma unroll
  for (int n = 0; n < States; ++n) {
    s[n] = ::fmaf(exp2_approximate(dt * a[n]), s[n], dt_u * B[n]);
    sums[n / 4] = n % 4 == 0 ? s[n] * C[n] : ::fmaf(s[n], C[n], sums[n / 4]);
  }
#pragma unroll
  for (int half = 1; half < States / 4; half *= 2)
#pragma unroll
    for (int i = 0; i < States / 4; i += 2 * half) sums[i] += sums[i + half];
  return sums[0];
}

/// `width` neighbouring channels of a head.
struct ScanTile {
  Index row, head, channel;
  int width;
};

/// Tiles of at most `channels` channels: those of a row, then those of the next.
template <class Inputs>
__device__ ScanTile scan_tile(const Inputs& in, int channels) {
  const auto heads = static_cast<unsigned>(in.B.shape[1]), P = static_cast<unsigned>(in.u.cols()) / heads;
  const unsigned per_head = ceil_div(P, channels), tile = blockIdx.x % (heads * per_head);
  const unsigned head = tile / per_head, offset = tile % per_head * channels;
  return {blockIdx.x / (heads * per_head), head, Index{head} * P + offset,
          static_cast<int>(::min(static_cast<unsigned>(channels), P - offset))};
}

}  // namespace zamba::kernel
