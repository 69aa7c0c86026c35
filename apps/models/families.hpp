// SPDX-License-Identifier: MIT
// A function for each unit of models, which compile beside each other. A model is here in the type of its published
// weights; another type of it costs an add more.
#pragma once

#include <zamba/checkpoints/registry.hpp>

namespace zamba_apps {

void add_llama(zamba::Registry& registry);
void add_mamba(zamba::Registry& registry);
void add_zamba(zamba::Registry& registry);
void add_zamba2(zamba::Registry& registry);

}  // namespace zamba_apps
