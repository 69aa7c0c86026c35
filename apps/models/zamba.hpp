// SPDX-License-Identifier: MIT
#pragma once

#include <zamba/checkpoints/registry.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/models/zamba_7b.hpp>

namespace zamba_apps {

template <class Device>
void add_zamba(zamba::Registry& registry) {
  registry.add<zamba::Zamba7B, zamba::bf16, Device>("Zamba-7B-v1")
      .template add<zamba::Zamba7B, float, Device>("Zamba-7B-v1");
}

}  // namespace zamba_apps
