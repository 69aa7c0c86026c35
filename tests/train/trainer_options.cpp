// SPDX-License-Identifier: MIT
// What a Trainer refuses before its first step: options that would be ignored, numbers beyond range, texts that do not
// fit the model.
#include <zamba/train/trainer.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>

#include <doctest/doctest.h>

#include "tests/support/nets.hpp"
#include "tests/support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::error_of;
using zamba_test::has;
using zamba_test::Hybrid;
using zamba_test::small;
using zamba_test::TemporaryFolder;
using zamba_test::Text;
using zamba_test::two_phases;

/// A trainer's refusal, which leaves the model as it was and no checkpoint; empty: it was made.
std::string refusal(const std::vector<Phase>& phases, const TrainerOptions& options) {
  Model<Hybrid, float> model(Seed{3});
  const auto before = zamba_test::weights_of(model);
  const std::string message = error_of([&] { Trainer(model, phases, options); });
  CHECK(zamba_test::weights_of(model) == before);
  return message;
}

}  // namespace

TEST_SUITE("train/trainer_options") {
  TEST_CASE("an option that would do nothing is an error that says so") {
    const Text text(4000);
    const TemporaryFolder folder;
    const auto phases = two_phases(text, 960);
    auto options = small();
    options.checkpoint_every_steps = 5;
    CHECK(refusal(phases, options) ==
          "zamba: TrainerOptions: checkpoint_every_steps is 5, but there is no folder for checkpoints");
    options = small(folder.path);
    options.evaluate_every_steps = 3;
    CHECK(refusal(phases, options) ==
          "zamba: TrainerOptions: evaluate_every_steps is 3, but there is no held_out text to measure");
    options = small();
    options.evaluate_every_steps = 3;
    options.held_out = text.parts.held_out;
    CHECK(
        refusal(phases, options) ==
        "zamba: TrainerOptions: evaluate_every_steps is 3, but there is no folder for the log that measurements go to");
    options = small();
    options.held_out = {nullptr, 0, 50};
    CHECK(refusal(phases, options) == "zamba: TrainerOptions: held_out is a range without a file");
    options = small();
    options.bytes_per_token = 3.5;
    CHECK(refusal(phases, options) ==
          "zamba: TrainerOptions: bytes_per_token is 3.5, but there is neither a held_out text nor a folder for a "
          "picture");
    options = small();
    options.progress_fd = 2;
    CHECK(refusal(phases, options) == "zamba: TrainerOptions: progress_fd is 2, but there is no progress");
    options = small();
    options.keep = Keep::nothing;
    CHECK(refusal(phases, options) ==
          "zamba: TrainerOptions: Keep::nothing leaves no way back; layer_inputs is the least");
    options = small();
    options.z_loss = -1e-4;
    CHECK(refusal(phases, options) == "zamba: TrainerOptions: z_loss must be finite and 0 or more, got -0.0001");

    options = small(folder.path);
    options.checkpoint_every_steps = 5;
    options.held_out = text.parts.held_out;
    options.evaluate_every_steps = 3;
    options.bytes_per_token = 3.5;
    options.progress = &std::cerr;
    options.progress_fd = 2;
    CHECK(refusal(phases, options) == "");
    options = small();
    options.held_out = text.parts.held_out;  // for held_out_bits_per_byte()
    CHECK(refusal(phases, options) == "");
    Model<Hybrid, float> model(Seed{3});
    CHECK(error_of([&] { Trainer(model, phases, small()).held_out_bits_per_byte(); }) ==
          "zamba: Trainer: there is no held-out text to measure: TrainerOptions has no held_out");
  }

  TEST_CASE("sizes beyond counting or memory are refused before anything is taken") {
    const Text text(4000);
    const auto phases = two_phases(text, 960);
    const auto with = [&](Index rows, Index length, Index accumulation) {
      auto options = small();
      options.rows = rows, options.length = length, options.accumulation = accumulation;
      return refusal(phases, options);
    };
    constexpr Index large = INT64_MAX;
    for (const Index size : {Index{1} << 36, Index{1} << 40, Index{1} << 61, Index{1} << 62, large}) {
      CAPTURE(size);
      CHECK(has(with(size, 8, 1), "TrainerOptions: rows x length x accumulation may be 4294967296 tokens, got "));
      CHECK(has(with(1, size, 1), "TrainerOptions: rows x length x accumulation may be 4294967296 tokens, got "));
      CHECK(has(with(1, 8, size), "TrainerOptions: rows x length x accumulation may be 4294967296 tokens, got "));
    }
    CHECK(has(with(Index{1} << 16, 8, Index{1} << 14), "got 65536 x 8 x 16384"));
    CHECK(has(with(large, large, large), "rows x length x accumulation"));
    for (const Index none : {Index{0}, Index{-1}, -large}) {
      CHECK(has(with(none, 8, 1), "rows, length and accumulation must be positive"));
      CHECK(has(with(1, none, 1), "rows, length and accumulation must be positive"));
      CHECK(has(with(1, 8, none), "rows, length and accumulation must be positive"));
    }
    CHECK(with(2, 8, 3) == "");

    auto long_phases = phases;
    long_phases[0].tokens = large;
    CHECK(has(refusal(long_phases, small()), "Trainer: phase 'pretraining' ends beyond 4611686018427387903 tokens"));
    long_phases[0].tokens = long_phases[1].tokens = large / 3;
    CHECK(has(refusal(long_phases, small()), "Trainer: phase 'annealing' ends beyond 4611686018427387903 tokens"));
    long_phases[0].tokens = large / 3, long_phases[1].tokens = 960;
    Model<Hybrid, float> model(Seed{3});
    Trainer trainer(model, long_phases, small());
    CHECK(trainer.steps() == large / 3 / 96 + 1 + 10);
    trainer.take_step();
    auto options = small();
    options.checkpoint_every_steps = -1;
    CHECK(has(refusal(phases, options), "must be 0 or more, got -1, 1 and 0"));
    for (const double bytes : {0., -1., std::nan(""), HUGE_VAL}) {
      options = small();
      options.bytes_per_token = bytes;
      CHECK(has(refusal(phases, options), "TrainerOptions: bytes_per_token must be positive, got "));
    }
  }

  TEST_CASE("rates and options that the optimiser refuses are found before the first step") {
    const Text text(4000);
    auto phases = two_phases(text, 960);
    phases[1].rate = LearningRate::warm_up(20, {.fraction = 0.5}).then(LearningRate::cosine(20, 1));
    CHECK(has(refusal(phases, small()),
              "Trainer: phase 'annealing': AdamW: a learning rate of 20 and a weight_decay of"));
    phases[1].rate = LearningRate::linear(0, 1e39);
    CHECK(has(refusal(phases, small()), "Trainer: phase 'annealing': AdamW: a learning rate of 1e+39 is too large"));
    auto options = small();
    options.adamw.eps = 1e-300;
    CHECK(has(refusal(two_phases(text, 960), options), "AdamW: eps must be positive"));
    phases = two_phases(text, 960);
    phases[1].name =
        "ann\xe9"
        "e";  // Latin-1: no checkpoint could name it
    CHECK(has(refusal(phases, small()), "names and metadata must be UTF-8"));
    phases = two_phases(text, 960);
    phases[0].mixture[0].name = "\xff";
    CHECK(has(refusal(phases, small()), "names and metadata must be UTF-8"));
  }

  TEST_CASE("an id outside the vocabulary is found before the first step, with its file and place") {
    const TemporaryFolder folder;
    std::vector<Token> tokens(6000);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<Token>(1 + i % 28);
    for (const TokenWidth width : {TokenWidth::u16, TokenWidth::u32})
      for (const Token outside : {29, 30'000}) {
        tokens[5000] = outside;
        write_token_file(folder.path / "bad", tokens, width);
        const TokenFile file = TokenFile::open(folder.path / "bad", width, 0);
        const auto message = [&](TokenRange train, TokenRange held_out) {
          auto options = small();
          options.held_out = held_out;
          return refusal({{"web", 960, LearningRate::constant(1e-3), {{train, 1, "pages"}}}}, options);
        };
        const std::string wanted = "zamba: TokenFile '" + file.path().string() + "': token 5000 is " +
                                   std::to_string(outside) +
                                   ", outside a vocabulary of 29; wrong width or wrong tokenizer?";
        CHECK(message({&file, 0, 5500}, {}) == wanted);
        CHECK(message({&file, 0, 5001}, {}) == wanted);  // only ever a target
        CHECK(message({&file, 0, 4000}, {&file, 4500, 6000}) == wanted);
        CHECK(message({&file, 0, 5000}, {&file, 5001, 6000}) == "");  // it is not used
      }
    // A later phase's text, too.
    const Text text(4000);
    const TokenFile file = TokenFile::open(folder.path / "bad", TokenWidth::u32);
    auto phases = two_phases(text, 960);
    phases[1].mixture.push_back({TokenRange::whole(file), 1, "pages"});
    CHECK(has(refusal(phases, small()), "bad': token 5000 is 30000, outside a vocabulary of 29"));
    // 16-bit ids read as 32-bit ones.
    tokens[5000] = 1;
    write_token_file(folder.path / "narrow", tokens, TokenWidth::u16);
    const TokenFile wide = TokenFile::open(folder.path / "narrow", TokenWidth::u32);
    CHECK(has(refusal({{"web", 960, LearningRate::constant(1e-3), {{TokenRange::whole(wide), 1, "pages"}}}}, small()),
              "narrow': token 0 is 131073, outside a vocabulary of 29; wrong width"));
  }

  TEST_CASE("a text without any target is refused, and so is an end of documents that cannot come") {
    const TemporaryFolder folder;
    std::vector<Token> tokens(2000, 7);
    std::fill_n(tokens.begin(), 1000, 3);
    write_token_file(folder.path / "ends", tokens, TokenWidth::u16);
    const TokenFile file = TokenFile::open(folder.path / "ends", TokenWidth::u16, 3);
    const auto message = [&](TokenRange train, TokenRange held_out) {
      auto options = small();
      options.held_out = held_out;
      return refusal({{"p", 960, LearningRate::constant(1e-3), {{train, 1, "t"}}}}, options);
    };
    CHECK(message({&file, 0, 1001}, {}) ==
          "zamba: Trainer: 't' of phase 'p' ('" + file.path().string() +
              "' from 0 to 1001) has no target: there is no token that another one follows in its document");
    CHECK(has(message(TokenRange::whole(file), {&file, 0, 500}), "Trainer: the held_out text ('"));
    CHECK(has(message(TokenRange::whole(file), {&file, 1999, 2000}), "has no target"));
    CHECK(message({&file, 0, 1002}, {&file, 1990, 2000}) == "");
    const TokenFile other = TokenFile::open(folder.path / "ends", TokenWidth::u16, 29);
    CHECK(has(refusal({{"p", 960, LearningRate::constant(1e-3), {{TokenRange::whole(other), 1, "t"}}}}, small()),
              "is 29, outside the model's vocabulary of 29"));
  }
}
