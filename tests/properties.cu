// SPDX-License-Identifier: MIT
// The promises of states and of generation on CUDA, by the bodies that run on the CPU; those of extend() are in
// model.cu.
#include <zamba/zamba.cuh>

#define ZAMBA_TEST_DEVICE cuda
#include "generate/prefix_reuse.cpp"
#include "generate/speculative.cpp"
#include "state.cpp"
