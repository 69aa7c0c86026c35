// SPDX-License-Identifier: MIT
// The least a user writes whose model is on CUDA and whose program is not nvcc's: some tokens, with the words of the
// error where there is no GPU.
#include <cstdio>

#include "net.hpp"

extern template class zamba::Model<Net, zamba::bf16, zamba::cuda>;

int main() try {
  const zamba::Model<Net, zamba::bf16, zamba::cuda> model(zamba::Seed{42});
  auto state = model.new_state({.batch = 1, .max_length = 8});
  const auto tokens = zamba::generate(model, state, std::vector<zamba::Token>{3}, {.max_new_tokens = 4});
  return tokens.size() == 4 ? 0 : 1;
} catch (const zamba::Error& error) {
  std::puts(error.what());
  return 1;
}
