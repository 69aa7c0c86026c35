// SPDX-License-Identifier: MIT
// Training in two phases, after Zamba: pretraining on much text, then annealing on better text mixed with a replay.
// zamba_04_train_two_phases TEXT BETTER_TEXT [TOKENS]
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include <zamba/text/byte_tokenizer.hpp>
#include <zamba/train/trainer.hpp>
#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 64, .n_heads = 4, .d_ff = 128}>;
using Net = zamba::LanguageModel<256, zamba::HybridStack<4, 2, Mixer, Shared>>;

/// A text as a file of byte tokens, memory-mapped.
zamba::TokenFile tokens_of(const std::string& text_path, const std::string& token_path) {
  std::ifstream in(text_path, std::ios::binary);
  zamba::require(in.good(), "cannot read the text '", text_path, "'");
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  zamba::write_token_file(token_path, zamba::ByteTokenizer().encode(text), zamba::TokenWidth::u16);
  return zamba::TokenFile::open(token_path, zamba::TokenWidth::u16);
}

/// Zamba's recipe: 950 B and 50 B tokens there, the same shape for any number here. Phases are data.
std::vector<zamba::Phase> recipe(zamba::TokenRange text, zamba::TokenRange better, zamba::Index tokens, double peak) {
  using Rate = zamba::LearningRate;
  return {{.name = "pretraining",
           .tokens = tokens * 95 / 100,
           .rate = Rate::warm_up(peak, {.fraction = 0.01}).then(Rate::cosine(peak, peak / 2)),
           .mixture = {{text, 1, "text"}}},
          {.name = "annealing",
           .tokens = tokens * 5 / 100,
           .rate = Rate::linear(peak / 2, 0.75 * peak)
                       .over({.fraction = 0.02})
                       .then(Rate::exponential(0.75 * peak, peak / 100)),
           .mixture = {{text, 0.6, "replay"}, {better, 0.4, "better"}}}};
}

int main(int argc, char** argv) try {
  zamba::require(argc == 3 || argc == 4, "wanted two texts: ", argv[0], " TEXT BETTER_TEXT [TOKENS]");
  const zamba::Index tokens = argc == 4 ? std::stol(argv[3]) : 200'000;
  const zamba::TokenFile text = tokens_of(argv[1], "text.tokens"), better = tokens_of(argv[2], "better.tokens");
  const zamba::TrainHeldOut parts = zamba::split(zamba::TokenRange::whole(text), 0.02);
  const auto phases = recipe(parts.train, zamba::TokenRange::whole(better), tokens, 3e-3);

  zamba::Model<Net> model(zamba::Seed{42});
  zamba::Trainer trainer(model, phases,
                         {.rows = 4,
                          .length = 256,
                          .folder = "two-phases",  // killed and started again, the run continues from here
                          .checkpoint_every_steps = 50,
                          .held_out = parts.held_out,
                          .progress = &std::cerr,
                          .progress_fd = 2});
  while (!trainer.finished()) {
    std::cout << "held out, after " << trainer.tokens() << " tokens: " << trainer.held_out_bits_per_byte()
              << " bits per byte\n";
    trainer.run_phase();
  }
  std::cout << "at the end: " << trainer.held_out_bits_per_byte() << " bits per byte\n";

  // The second phase alone, from any checkpoint of the first: another seed, another mixture, another rate.
  zamba::Model<Net> again(zamba::Seed{1});
  zamba::Trainer annealing(again, {phases[1]},
                           {.rows = 4, .length = 256, .seed = {7}, .start_from = "two-phases/phase-1.safetensors"});
  annealing.run();
  std::cout << "annealed once more, with other batches: last loss " << annealing.loss() << " nats a byte\n";
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
