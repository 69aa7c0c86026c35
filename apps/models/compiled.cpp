// SPDX-License-Identifier: MIT
#include "../models.hpp"
#include "families.hpp"

zamba::Registry zamba_apps::compiled_models() {
  zamba::Registry registry;
  add_zamba(registry);
  add_zamba2(registry);
  add_mamba(registry);
  add_llama(registry);
  return registry;
}
