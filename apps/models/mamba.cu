// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "mamba.hpp"

template void zamba_apps::add_mamba<zamba::cuda>(zamba::Registry& registry);
