// SPDX-License-Identifier: MIT
// Sums of products over eight channels by tensor cores (PTX ISA: mma.m16n8k8 in tf32, from compute capability 8.0 on):
// of four tokens, sum over channels of factor(token, channel) value(token, channel, state). It takes a fraction of what
// shuffles would, and multiplies too.
//
// Each mma has the values of one token, and the factors of that token in its own columns of b; in the other columns are
// zeros. Lane (i, j) = (lane / 4, lane % 4) has a pair of channels, of group i % 2, and four states, those of slice
// i / 2. States 0 and 1 go into one sum, 2 and 3 into another:
//   a (16 x 8)   values    (i, j): state 0 of channel 0, (i + 8, j): state 1, (i, j + 4), (i + 8, j + 4): of channel 1
//   b (8 x 8)    factors   (j, i), (j + 4, i): of channels 0 and 1, where i / 2 is the token
//   c (16 x 8)   sums      (i, 2j + k): token j, state 0, k = i % 2; for the other k, of values and factors of two
//                          groups, which nobody wants; (i + 8, 2j + k): state 1
#pragma once

#include <zamba/device.hpp>

namespace zamba::kernel {

/// c += a b, of a and b in tf32: the upper 19 bits of a float.
__device__ inline void mma_m16n8k8(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/// All lanes of a warp call each function together. Exact: of products in float, with 22 bits of each; otherwise of
/// factors and values with 11 bits, rounded towards zero.
template <bool Exact>
class ChannelSums {
 public:
  /// What to multiply sums by: rounding takes 2^-11 / (2 ln 2) of a factor and of a value on average.
  static constexpr float scale = Exact ? 1.0f : 1.0f + 0x1p-10f * 0.72134752f;

  /// values: (channel, state). token: a constant.
  __device__ void add(int token, const float (&factors)[2], const float (&values)[2][4]) {
    const bool mine = static_cast<int>(threadIdx.x) % 32 / 8 == token;
    if constexpr (Exact) {
      float products[2][4], rest[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& product = products[i / 4][i % 4] = factors[i / 4] * values[i / 4][i % 4];
        rest[i / 4][i % 4] = product - __uint_as_float(__float_as_uint(product) & 0xffffe000u);
      }
      multiply(products, mine ? 1.0f : 0.0f, mine ? 1.0f : 0.0f);
      multiply(rest, mine ? 1.0f : 0.0f, mine ? 1.0f : 0.0f);
    } else {
      multiply(values, mine ? factors[0] : 0.0f, mine ? factors[1] : 0.0f);
    }
  }

  /// Of token lane % 4, of the lane's states over its group of channels.
  __device__ float4 take() const {
    const bool odd = threadIdx.x / 4 % 2 > 0;
    return make_float4(odd ? sums_[0][1] : sums_[0][0], odd ? sums_[0][3] : sums_[0][2],
                       odd ? sums_[1][1] : sums_[1][0], odd ? sums_[1][3] : sums_[1][2]);
  }

 private:
  __device__ void multiply(const float (&values)[2][4], float factor0, float factor1) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      mma_m16n8k8(sums_[k], values[0][2 * k], values[0][2 * k + 1], values[1][2 * k], values[1][2 * k + 1], factor0,
                  factor1);
  }

  float sums_[2][4] = {};
};

}  // namespace zamba::kernel
