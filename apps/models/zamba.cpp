// SPDX-License-Identifier: MIT
#include "families.hpp"

#include <zamba/checkpoints/zamba.hpp>
#include <zamba/models/zamba_7b.hpp>

void zamba_apps::add_zamba(zamba::Registry& registry) {
  registry.add<zamba::Zamba7B, zamba::bf16>("Zamba-7B-v1").add<zamba::Zamba7B, float>("Zamba-7B-v1");
}
