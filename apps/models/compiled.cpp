// SPDX-License-Identifier: MIT
// ZAMBA_CUDA_MODELS is defined where the .cu files beside this are compiled too.
#include "../models.hpp"
#include "families.hpp"

namespace {

template <class Device>
void add_all(zamba::Registry& registry) {
  zamba_apps::add_zamba<Device>(registry);
  zamba_apps::add_zamba2<Device>(registry);
  zamba_apps::add_mamba<Device>(registry);
  zamba_apps::add_llama<Device>(registry);
}

}  // namespace

zamba::Registry zamba_apps::compiled_models() {
  zamba::Registry registry;
  add_all<zamba::cpu>(registry);
#ifdef ZAMBA_CUDA_MODELS
  add_all<zamba::cuda>(registry);
#endif
  return registry;
}
