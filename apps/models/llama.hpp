// SPDX-License-Identifier: MIT
// Llama and what is built like it.
#pragma once

#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/registry.hpp>
#include <zamba/models/llama.hpp>

namespace zamba_apps {

template <class Device>
void add_llama(zamba::Registry& registry) {
  using zamba::bf16;
  registry.add<zamba::Llama2_7B, bf16, Device>("Llama-2-7B")
      .template add<zamba::Llama3_8B, bf16, Device>("Llama-3-8B")
      .template add<zamba::TinyLlama_1_1B, bf16, Device>("TinyLlama-1.1B")
      .template add<zamba::Mistral_7B_v0_3, bf16, Device>("Mistral-7B-v0.3");
}

}  // namespace zamba_apps
