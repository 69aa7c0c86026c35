// SPDX-License-Identifier: MIT
// Speculative decoding: a cheap draft proposes tokens, the model judges several in one pass, and the text is the one
// that the model writes alone. Here the draft is the model itself with weights of 16 bits; any model with the same
// tokens does, the smaller and the better it guesses the better.
#include <chrono>
#include <iostream>

#include <zamba/generate/generator.hpp>
#include <zamba/generate/speculative.hpp>
#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 256, .d_state = 16, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 256, .n_heads = 8}>;
using Net = zamba::LanguageModel<256, zamba::HybridStack<12, 6, Mixer, Shared>>;

template <class F>
double seconds(F&& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

int main() {
  const zamba::Model<Net> model(zamba::Seed{42});
  const auto draft = model.to<zamba::bf16>();
  const std::vector<zamba::Token> prompt{72, 101, 108, 108, 111};

  std::vector<zamba::Token> plain;
  const double alone = seconds([&] {
    auto state = model.new_state({.max_length = 256});
    plain = zamba::generate(model, state, prompt, {.sampling = {.temperature = 0}, .max_new_tokens = 128});
  });

  zamba::SpeculativeOutput output;
  const double together = seconds([&] {
    auto state = model.new_state({.max_length = 256});
    auto draft_state = draft.new_state({.max_length = 256});
    output = zamba::generate_speculatively(model, state, draft, draft_state, prompt,
                                           {.max_new_tokens = 128, .draft_tokens = 4});
  });

  std::cout << output.tokens.size() << " tokens in " << output.passes << " passes of the model; " << output.accepted
            << " of " << output.proposed << " proposed tokens were accepted\n"
            << "alone " << 1e3 * alone << " ms, with the draft " << 1e3 * together << " ms\n"
            << (output.tokens == plain ? "the same tokens\n" : "other tokens: two logits were equal to rounding\n");
  return output.tokens == plain ? 0 : 1;
}
