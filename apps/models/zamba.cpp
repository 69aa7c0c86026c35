// SPDX-License-Identifier: MIT
#include "zamba.hpp"

template void zamba_apps::add_zamba<zamba::cpu>(zamba::Registry& registry);
