// SPDX-License-Identifier: MIT
// Everything, with the kernels: for nvcc.
#pragma once

#include <zamba/zamba.hpp>

#include <zamba/context.cuh>
#include <zamba/ops/rms_norm.cuh>
#include <zamba/ops/selective_scan.cuh>
