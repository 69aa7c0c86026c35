// SPDX-License-Identifier: MIT
// A hybrid as a type, beside a plain stack of the same width: what the shared block costs, and what it does not.
#include <iostream>

#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256, .d_state = 16, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8, .d_ff = 1024}>;

using Hybrid = zamba::LanguageModel<256, zamba::HybridStack<12, 6, Mixer, Shared>>;  // every 6th layer attends
using Written =
    zamba::LanguageModel<256, zamba::PatternStack<"mmmmmhmmmmmh", Mixer, Shared>>;  // the same, layer by layer
using Plain = zamba::LanguageModel<256, zamba::UniformStack<12, Mixer>>;

static_assert(zamba::parameter_count<Hybrid> == zamba::parameter_count<Written>);

template <class Net>
void describe(const char* name) {
  std::cout << name << ": " << zamba::parameter_count<Net> << " parameters, "
            << zamba::active_parameter_count<Net> << " active, " << zamba::flops_per_token<Net> / 1'000'000
            << " MFLOP a token, state of a sequence of 1,000 tokens " << zamba::state_bytes<Net, float>(1, 1'000) / 1024
            << " KiB, of 10,000 tokens " << zamba::state_bytes<Net, float>(1, 10'000) / 1024 << " KiB\n";
}

int main() {
  describe<Hybrid>("hybrid");
  describe<Plain>("plain Mamba");

  const zamba::Model<Hybrid> model(zamba::Seed{42});  // float on the CPU
  auto state = model.new_state({.batch = 1, .max_length = 64});
  const auto logits = model.extend(state, {72, 101, 108, 108, 111});  // a prompt; one token; a further chunk: one path
  std::cout << "logits after " << state.length() << " tokens: " << logits.rows() << " x " << logits.cols() << '\n';
}
