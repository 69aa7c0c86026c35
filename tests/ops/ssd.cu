// SPDX-License-Identifier: MIT
#include <zamba/ops/ssd.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "ssd.cpp"
