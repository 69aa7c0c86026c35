// SPDX-License-Identifier: MIT
// expect: zamba::RmsNorm has no version for this device here: include <zamba/ops/rms_norm.cuh> or <zamba/zamba.cuh>
// expect: and compile with nvcc, or declare the model `extern template`
#include <zamba/ops/rms_norm.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Device = zamba::cpu;
#else
using Device = zamba::cuda;
#endif

void normalise(zamba::Context<Device>& ctx, zamba::Matrix<float> x, zamba::Vector<float> weight,
               zamba::Vector<float> rstd) {
  zamba::rms_norm(ctx, x, {}, weight, 1e-5, x, rstd);
}
