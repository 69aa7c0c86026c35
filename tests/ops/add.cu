// SPDX-License-Identifier: MIT
#include <zamba/ops/add.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>, On<cuda, bf16>
#include "add.cpp"
