// SPDX-License-Identifier: MIT
// Generation: a prompt, and the tokens that follow it, as they come.
//
//   03_generate                        a small model with random weights: bytes without sense, but the whole path
//   03_generate DIRECTORY ID [ID ...]  Zamba-7B-v1 in Hugging Face layout, weights kept in bfloat16, prompt as token
//   ids
#include <cstdlib>
#include <iostream>

#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64, .d_state = 16, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4}>;
using Small = zamba::LanguageModel<256, zamba::HybridStack<6, 3, Mixer, Shared>>;

template <class Model>
void run(const Model& model, const std::vector<zamba::Token>& prompt) {
  auto state = model.new_state({.batch = 1, .max_length = 512});
  const zamba::GenerationOptions options{.sampling = {.temperature = 0.8, .top_k = 40, .repetition_penalty = 1.1},
                                         .max_new_tokens = 32,
                                         .stop_tokens = {2},
                                         .seed = zamba::Seed{7}};
  zamba::generate(model, state, prompt, options, [](zamba::Index, zamba::Token token) {
    std::cout << token << ' ' << std::flush;
    return true;  // false would stop the row
  });
  std::cout << "\nstate: " << state.length() << " positions, " << state.bytes() / 1024 << " KiB reserved\n";
}

int main(int argc, char** argv) try {
  if (argc == 1) {
    run(zamba::Model<Small>(zamba::Seed{1}), {72, 101, 108, 108, 111});
  } else {
    std::vector<zamba::Token> prompt{1};  // the beginning of a sequence
    for (int i = 2; i < argc; ++i) prompt.push_back(std::atoi(argv[i]));
    run(zamba::load_huggingface<zamba::Zamba7B, zamba::bf16>(argv[1]), prompt);
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
