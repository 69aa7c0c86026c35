// SPDX-License-Identifier: MIT
// Mamba and Mamba-2, of one format.
#include "families.hpp"

#include <zamba/checkpoints/mamba.hpp>
#include <zamba/models/mamba.hpp>
#include <zamba/models/mamba2.hpp>

void zamba_apps::add_mamba(zamba::Registry& registry) {
  registry.add<zamba::Mamba_130M, float>("Mamba-130M")
      .add<zamba::Mamba_370M, float>("Mamba-370M")
      .add<zamba::Mamba_790M, float>("Mamba-790M")
      .add<zamba::Mamba_1_4B, float>("Mamba-1.4B")
      .add<zamba::Mamba_2_8B, float>("Mamba-2.8B");
  registry.add<zamba::Mamba2_130M, float>("Mamba2-130M")
      .add<zamba::Mamba2_370M, float>("Mamba2-370M")
      .add<zamba::Mamba2_790M, float>("Mamba2-790M")
      .add<zamba::Mamba2_1_4B, float>("Mamba2-1.4B")
      .add<zamba::Mamba2_2_8B, float>("Mamba2-2.7B")
      .add<zamba::MambaCodestral_7B, zamba::bf16>("Mamba-Codestral-7B-v0.1");
}
