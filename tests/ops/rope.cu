// SPDX-License-Identifier: MIT
#include <zamba/ops/rope.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "rope.cpp"
