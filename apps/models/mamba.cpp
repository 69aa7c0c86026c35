// SPDX-License-Identifier: MIT
#include "mamba.hpp"

template void zamba_apps::add_mamba<zamba::cpu>(zamba::Registry& registry);
