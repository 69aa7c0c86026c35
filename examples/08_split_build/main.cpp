// SPDX-License-Identifier: MIT
// A model on CUDA in a program that g++ or clang compiles, without CUDA's headers: its kernels are in kernels.cu, which
// changes only where the model does.
#include <iostream>
#include <vector>

#include "net.hpp"

extern template class zamba::Model<Net, zamba::bf16, zamba::cuda>;

int main() try {
  using Model = zamba::Model<Net, zamba::bf16, zamba::cuda>;
  const Model model(zamba::Seed{1});
  const zamba::StateOptions rows{.batch = 2, .max_length = 64};
  auto state = model.new_state(rows);
  std::cout << "state: " << state.bytes() << " bytes, workspace: at most " << Model::workspace_bytes(rows)
            << " bytes\n";

  const std::vector<std::vector<zamba::Token>> prompts{{72, 101, 108, 108, 111}, {87, 104, 121, 63}};
  const zamba::GenerationOptions options{.sampling = {.temperature = 0.8}, .max_new_tokens = 16};
  for (const std::vector<zamba::Token>& row : zamba::generate(model, state, prompts, options)) {
    for (const zamba::Token token : row) std::cout << token << ' ';
    std::cout << '\n';
  }
} catch (const zamba::Error& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
