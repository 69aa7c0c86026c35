// SPDX-License-Identifier: MIT
// The demo on CUDA: demo.cpp with all the kernels.
#include <zamba/zamba.cuh>

#define ZAMBA_DEMO_DEVICE cuda
#include "demo.cpp"
