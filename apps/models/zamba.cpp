// SPDX-License-Identifier: MIT
#include "families.hpp"

#include <zamba/models/zamba_7b.hpp>

void zamba_apps::add_zamba(zamba::Registry& registry) { add_both<zamba::Zamba7B>(registry, "Zamba-7B-v1"); }
