// SPDX-License-Identifier: MIT
// One block by itself: a type that says what is computed, and functions of it that compute.
#include <iostream>

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/testing/conformance.hpp>

// A Mamba layer of width 64 with two heads. It holds no data: sizes are constants of the type.
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64, .d_state = 16, .n_heads = 2}>;
static_assert(zamba::parameter_count<Mixer> == 32'704);
static_assert(zamba::state_bytes<Mixer, float>(1, 1'000'000) == zamba::state_bytes<Mixer, float>(1, 1));  // recurrent

int main() {
  // Its parameters by name, as a checkpoint or an optimiser sees them.
  Mixer::Parameters<float, float> parameters;
  zamba::visit_parameters<Mixer>(
      parameters, [](const zamba::Name& name, auto&, auto shape, zamba::Initializer, zamba::Decay decay) {
        std::cout << name.str() << " (";
        for (const zamba::Index extent : shape.extent) std::cout << ' ' << extent;
        std::cout << " )" << (decay == zamba::Decay::yes ? "" : "  no weight decay") << '\n';
      });

  // And the proof that it is right: splits, ragged batches, causality, gradients by finite differences.
  std::cout << '\n' << zamba::testing::conformance<Mixer>();
}
