// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "llama.hpp"

template void zamba_apps::add_llama<zamba::cuda>(zamba::Registry& registry);
