// SPDX-License-Identifier: MIT
#include "families.hpp"

#include <zamba/models/llama.hpp>
#include <zamba/models/llama_checkpoint.hpp>

void zamba_apps::add_llama(zamba::Registry& registry) { registry.add<zamba::Llama2_7B, zamba::bf16>("Llama-2-7B"); }
