// SPDX-License-Identifier: MIT
// expect: zamba::Halve has no version for this device here: include <zamba/ops/halve.cuh> or <zamba/zamba.cuh>
#include <zamba/device.hpp>
#include <zamba/op.hpp>

namespace zamba {
ZAMBA_DECLARE_OPERATOR(Halve, "halve.cuh");
template <>
struct Halve<cpu> {
  static float forward(float x) { return x / 2; }
};
}  // namespace zamba

#ifndef ZAMBA_EXPECT_FAILURE
float half(float x) { return zamba::Halve<zamba::cpu>::forward(x); }
#else
float half(float x) { return zamba::Halve<zamba::cuda>::forward(x); }
#endif
