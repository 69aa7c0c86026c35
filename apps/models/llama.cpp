// SPDX-License-Identifier: MIT
#include "families.hpp"

#include <zamba/checkpoints/llama.hpp>
#include <zamba/models/llama.hpp>

void zamba_apps::add_llama(zamba::Registry& registry) {
  registry.add<zamba::Llama2_7B, zamba::bf16>("Llama-2-7B")
      .add<zamba::Llama3_8B, zamba::bf16>("Llama-3-8B")
      .add<zamba::TinyLlama_1_1B, zamba::bf16>("TinyLlama-1.1B")
      .add<zamba::Mistral_7B_v0_3, zamba::bf16>("Mistral-7B-v0.3");
}
