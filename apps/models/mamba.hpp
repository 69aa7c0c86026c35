// SPDX-License-Identifier: MIT
// Mamba and Mamba-2, of one format.
#pragma once

#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/registry.hpp>
#include <zamba/models/mamba.hpp>
#include <zamba/models/mamba2.hpp>

namespace zamba_apps {

template <class Device>
void add_mamba(zamba::Registry& registry) {
  registry.add<zamba::Mamba_130M, float, Device>("Mamba-130M")
      .template add<zamba::Mamba_370M, float, Device>("Mamba-370M")
      .template add<zamba::Mamba_790M, float, Device>("Mamba-790M")
      .template add<zamba::Mamba_1_4B, float, Device>("Mamba-1.4B")
      .template add<zamba::Mamba_2_8B, float, Device>("Mamba-2.8B");
  registry.add<zamba::Mamba2_130M, float, Device>("Mamba2-130M")
      .template add<zamba::Mamba2_370M, float, Device>("Mamba2-370M")
      .template add<zamba::Mamba2_790M, float, Device>("Mamba2-790M")
      .template add<zamba::Mamba2_1_4B, float, Device>("Mamba2-1.4B")
      .template add<zamba::Mamba2_2_8B, float, Device>("Mamba2-2.7B")
      .template add<zamba::MambaCodestral_7B, zamba::bf16, Device>("Mamba-Codestral-7B-v0.1");
}

}  // namespace zamba_apps
