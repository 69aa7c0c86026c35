// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "small_models.hpp"

void zamba_test::add_cuda_models(zamba::Registry& registry) { registry.add<ByteNet, float, zamba::cuda>("bytes"); }
