// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "zamba.hpp"

template void zamba_apps::add_zamba<zamba::cuda>(zamba::Registry& registry);
