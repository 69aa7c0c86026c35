// SPDX-License-Identifier: MIT
#include "zamba2.hpp"

template void zamba_apps::add_zamba2<zamba::cpu>(zamba::Registry& registry);
