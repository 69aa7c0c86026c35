// SPDX-License-Identifier: MIT
#include "small_models.hpp"

#include <zamba/checkpoints/zamba.hpp>

#include <apps/models.hpp>

zamba::Registry zamba_apps::compiled_models() {
  zamba::Registry registry;
  registry.add<zamba_test::CapitalsNet, float>("zamba-case");
  registry.add<zamba_test::CapitalsNet, zamba::bf16>("zamba-case");
  registry.add<zamba_test::ByteNet, float>("bytes");
#ifdef ZAMBA_CUDA_MODELS
  zamba_test::add_cuda_models(registry);
#endif
  return registry;
}
