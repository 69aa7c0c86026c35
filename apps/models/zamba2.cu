// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "zamba2.hpp"

template void zamba_apps::add_zamba2<zamba::cuda>(zamba::Registry& registry);
