// SPDX-License-Identifier: MIT
// A function for each family of models: <family>.hpp defines it, <family>.cpp compiles it for the CPU and <family>.cu
// for CUDA, beside each other. A model is here in the type of its published weights; another type of it costs an add
// more.
#pragma once

#include <zamba/checkpoints/registry.hpp>

namespace zamba_apps {

template <class Device>
void add_llama(zamba::Registry& registry);
template <class Device>
void add_mamba(zamba::Registry& registry);
template <class Device>
void add_zamba(zamba::Registry& registry);
template <class Device>
void add_zamba2(zamba::Registry& registry);

}  // namespace zamba_apps
