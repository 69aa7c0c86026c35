// SPDX-License-Identifier: MIT
// Many requests with one beginning, such as instructions: it is read once, and every request goes on from a copy of the
// state. A recurrent state is small whatever the length, so a copy costs little beside reading the text again.
#include <iostream>
#include <string>

#include <zamba/generate/generator.hpp>
#include <zamba/text/byte_tokenizer.hpp>
#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64, .d_state = 16, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4}>;
using Net = zamba::LanguageModel<256, zamba::HybridStack<6, 3, Mixer, Shared>>;

int main() {
  const zamba::Model<Net> model(zamba::Seed{1});
  const zamba::ByteTokenizer tokenizer;
  const std::string common = "You answer questions about a library, shortly and politely. ";
  const std::vector<std::string> requests{"What is a state?", "Who reads it?", "How large is it?"};
  const zamba::GenerationOptions greedy{.sampling = {.temperature = 0}, .max_new_tokens = 24};

  auto prefix = model.new_state({.max_length = 256});
  model.extend(prefix, tokenizer.encode(common));

  // One after the other, each from a copy ...
  std::vector<std::vector<zamba::Token>> prompts, answers;
  for (const std::string& request : requests) {
    prompts.push_back(tokenizer.encode(request));
    auto state = prefix;
    answers.push_back(zamba::generate(model, state, prompts.back(), greedy));
  }
  // ... or all at once, as a batch of three rows that begin alike.
  auto rows = prefix.gather(std::vector<zamba::Index>(requests.size(), 0));
  bool equal = zamba::generate(model, rows, prompts, greedy) == answers;

  // The same as reading everything anew.
  for (std::size_t i = 0; i < requests.size(); ++i) {
    auto state = model.new_state({.max_length = 256});
    equal = equal && zamba::generate(model, state, tokenizer.encode(common + requests[i]), greedy) == answers[i];
  }
  std::cout << requests.size() << " requests over " << prefix.length() << " tokens read once, "
            << (equal ? "with the tokens of reading them each time\n" : "with other tokens\n");
  return equal ? 0 : 1;
}
