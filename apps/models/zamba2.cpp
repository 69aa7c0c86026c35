// SPDX-License-Identifier: MIT
#include "families.hpp"

#include <zamba/checkpoints/zamba2.hpp>
#include <zamba/models/zamba2.hpp>

void zamba_apps::add_zamba2(zamba::Registry& registry) {
  registry.add<zamba::Zamba2_1_2B, zamba::bf16>("Zamba2-1.2B")
      .add<zamba::Zamba2_2_7B, zamba::bf16>("Zamba2-2.7B")
      .add<zamba::Zamba2_7B, zamba::bf16>("Zamba2-7B");
}
