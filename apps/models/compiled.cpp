// SPDX-License-Identifier: MIT
#include "../models.hpp"
#include "families.hpp"

zamba::Registry zamba_apps::compiled_models() {
  zamba::Registry registry;
  add_zamba(registry);
  return registry;
}
