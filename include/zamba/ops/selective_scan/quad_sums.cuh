// SPDX-License-Identifier: MIT
// Sums over four neighbouring lanes by tensor cores (PTX ISA: mma.m16n8k8 in tf32, from compute capability 8.0 on): the
// values are one operand, ones and zeros the other. It is a fraction of what shuffles would take.
//
// Fragments, with i = lane / 4 and j = lane % 4:
//   a (16 x 8)   (i, j), (i + 8, j), (i, j + 4), (i + 8, j + 4)
//   b (8 x 8)    (j, i), (j + 4, i)
//   c (16 x 8)   (i, 2j), (i, 2j + 1), (i + 8, 2j), (i + 8, 2j + 1)
#pragma once

#include <zamba/device.hpp>

namespace zamba::kernel {

/// c += a b, of a and b in tf32: the upper 19 bits of a float.
__device__ inline void mma_m16n8k8(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

/// The sums of four sets of four values a lane; lane j of every four gets those of set j. All lanes of a warp call each
/// function together. Exact: with 22 bits of each value, otherwise with 11, rounded towards zero.
template <bool Exact>
class QuadSums {
 public:
  /// What to multiply sums by: rounding takes 2^-11 / (2 ln 2) of a value on average.
  static constexpr float scale = Exact ? 1.0f : 1.0f + 0x1p-11f * 0.72134752f;

  /// Set: a constant. Columns 2 set and 2 set + 1 of c are its first values and its others.
  __device__ void add(int set, const float (&values)[4]) {
    const int i = threadIdx.x % 32 / 4;
    const float columns[2] = {i == 2 * set ? 1.0f : 0.0f, i == 2 * set + 1 ? 1.0f : 0.0f};
    mma_m16n8k8(sums_, {values[0], values[2], values[1], values[3]}, columns);
    if constexpr (Exact) {
      float rest[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) rest[k] = values[k] - __uint_as_float(__float_as_uint(values[k]) & 0xffffe000u);
      mma_m16n8k8(sums_, {rest[0], rest[2], rest[1], rest[3]}, columns);
    }
  }

  /// The sums of this lane's set; those that follow begin at zero.
  __device__ float4 take() {
    const float4 sums = make_float4(sums_[0], sums_[1], sums_[2], sums_[3]);
#pragma unroll
    for (float& sum : sums_) sum = 0;
    return sums;
  }

 private:
  float sums_[4] = {};
};

}  // namespace zamba::kernel
