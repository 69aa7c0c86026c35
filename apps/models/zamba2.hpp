// SPDX-License-Identifier: MIT
#pragma once

#include <zamba/checkpoints/registry.hpp>
#include <zamba/checkpoints/zamba2.hpp>
#include <zamba/models/zamba2.hpp>

namespace zamba_apps {

template <class Device>
void add_zamba2(zamba::Registry& registry) {
  registry.add<zamba::Zamba2_1_2B, zamba::bf16, Device>("Zamba2-1.2B")
      .template add<zamba::Zamba2_2_7B, zamba::bf16, Device>("Zamba2-2.7B")
      .template add<zamba::Zamba2_7B, zamba::bf16, Device>("Zamba2-7B");
}

}  // namespace zamba_apps
