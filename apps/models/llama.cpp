// SPDX-License-Identifier: MIT
#include "llama.hpp"

template void zamba_apps::add_llama<zamba::cpu>(zamba::Registry& registry);
