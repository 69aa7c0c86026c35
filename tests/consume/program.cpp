// SPDX-License-Identifier: MIT
// The least a user writes: a model of a few weights, one token through it, and a number printed as JSON: the headers
// and both dependencies are found, and what they define links.
#include <cmath>
#include <cstdio>

#include <nlohmann/json.hpp>
#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 16, .d_state = 4}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 16, .n_heads = 2, .d_ff = 32}>;
using Net = zamba::LanguageModel<8, zamba::HybridStack<2, 2, Mixer, Shared>>;

int main() {
  const zamba::Model<Net> model(zamba::Seed{42});
  auto state = model.new_state({.batch = 1, .max_length = 4});
  const auto logits = model.extend(state, {3});
  std::printf("%s\n",
              nlohmann::json{{"parameters", zamba::parameter_count<Net>}, {"logit", logits(0, 0)}}.dump().c_str());
  return logits.cols() == 8 && std::isfinite(logits(0, 0)) ? 0 : 1;
}
