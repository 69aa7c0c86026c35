// SPDX-License-Identifier: MIT
// Everything, with the kernels: for nvcc.
#pragma once

#include <zamba/zamba.hpp>

#include <zamba/context.cuh>
#include <zamba/generate/generator.cuh>
#include <zamba/generate/sampler.cuh>
#include <zamba/ops/adamw_step.cuh>
#include <zamba/ops/add.cuh>
#include <zamba/ops/attention.cuh>
#include <zamba/ops/causal_conv1d.cuh>
#include <zamba/ops/cross_entropy.cuh>
#include <zamba/ops/embedding.cuh>
#include <zamba/ops/gated_activation.cuh>
#include <zamba/ops/gated_rms_norm.cuh>
#include <zamba/ops/linear.cuh>
#include <zamba/ops/rms_norm.cuh>
#include <zamba/ops/rope.cuh>
#include <zamba/ops/selective_scan.cuh>
#include <zamba/ops/ssd.cuh>

namespace zamba::detail {

template <template <class> class... Operators>
inline constexpr bool backward_as_stated = ((defines_backward<Operators<cuda>> == has_backward<Operators, cuda>)&&...);

static_assert(backward_as_stated<Attention, CausalConv1d, CrossEntropy, Embedding, GatedActivation, GatedRmsNorm,
                                 Linear, RmsNorm, SelectiveScan, Ssd>,
              "zamba: op.hpp does not say which of these kernels have a backward pass");

}  // namespace zamba::detail
