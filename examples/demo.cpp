// SPDX-License-Identifier: MIT
// A hybrid learns to write from a text, in minutes: two phases of training, judged on text it never saw, a sample, and
// what the shared block costs beside a plain Mamba stack. On a few processor cores it is a small one; demo.cu is the
// same on CUDA, with about 100 M parameters. scripts/demo builds and runs either.
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <CLI/CLI.hpp>

#include <zamba/generate/generator.hpp>
#include <zamba/text/byte_tokenizer.hpp>
#include <zamba/train/trainer.hpp>
#include <zamba/zamba.hpp>

namespace {

using zamba::Index;
using zamba::LearningRate;
using zamba::Token;
using zamba::TokenRange;
using zamba::TokenWidth;

#ifndef ZAMBA_DEMO_DEVICE
#define ZAMBA_DEMO_DEVICE cpu
#endif
using Device = zamba::ZAMBA_DEMO_DEVICE;

/// What a device trains in minutes.
struct Size {
  Index width, layers, period, heads, d_ff, rows, length;
  double rate, minutes;
};
template <class Device>
constexpr Size size_on;
template <>
constexpr Size size_on<zamba::cpu> = {.width = 128,
                                      .layers = 8,
                                      .period = 4,
                                      .heads = 4,
                                      .d_ff = 256,
                                      .rows = 2,
                                      .length = 256,
                                      .rate = 6e-3,  // high, as short runs of small batches want it
                                      .minutes = 3.5};
template <>
constexpr Size size_on<zamba::cuda> = {.width = 768,
                                       .layers = 24,
                                       .period = 6,
                                       .heads = 12,
                                       .d_ff = 1536,
                                       .rows = 16,
                                       .length = 1024,
                                       .rate = 1e-3,
                                       .minutes = 2};
constexpr Size size = size_on<Device>;

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = size.width, .d_state = 16, .n_heads = 2}>;
using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{
    .d_model = size.width, .n_heads = size.heads, .d_ff = size.d_ff}>;
using Hybrid = zamba::LanguageModel<256, zamba::HybridStack<size.layers, size.period, Mixer, Shared>>;
using Plain = zamba::LanguageModel<256, zamba::UniformStack<size.layers, Mixer>>;
using Storage = std::conditional_t<std::is_same_v<Device, zamba::cpu>, float, zamba::bf16>;
template <class Net>
using ModelOf = zamba::Model<Net, Storage, Device>;
using Context = zamba::Context<Device>;

constexpr Index measurements = 8;  // of the held-out loss: at the beginning, at the end of each phase, and between

struct Options {
  std::string text;
  std::string folder = "zamba-demo";
  double minutes = size.minutes;
  Index tokens = 0;
  int threads = 0;
  bool resume = false;
};

struct Texts {
  zamba::TokenFile train, held_out;
  TokenRange late;  // the last tenth of train
  std::string first_words;
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Documents: the parts between empty lines, short ones together.
std::vector<std::string_view> documents_of(std::string_view text) {
  constexpr std::size_t shortest = 2000;
  std::vector<std::string_view> documents;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t at = text.find("\n\n", std::min(begin + shortest, text.size()));
    const std::size_t end = at == std::string_view::npos ? text.size() : at + 2;
    documents.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return documents;
}

/// Two files of tokens: every so many documents are held out, at most a tenth and about 64 KB.
Texts prepare(const Options& options) {
  std::ifstream in(options.text, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  zamba::require(in.good(), "cannot read the text '", options.text, "'");
  zamba::require(text.size() >= 200'000, "'", options.text, "' has ", text.size(),
                 " bytes; at least 200000 are needed to learn anything from");
  const zamba::ByteTokenizer tokenizer;
  const std::size_t every = std::max<std::size_t>(10, text.size() >> 16);
  std::vector<Token> train, held_out;
  const auto documents = documents_of(text);
  zamba::require(documents.size() > every, "'", options.text, "' has no empty lines between its parts");
  for (std::size_t i = 0; i < documents.size(); ++i) {
    const std::vector<Token> document = tokenizer.encode_document(documents[i]);
    auto& to = i % every == every / 2 ? held_out : train;
    to.insert(to.end(), document.begin(), document.end());
  }
  const std::string base = options.folder + "/";
  const auto file = [&](const char* name, const std::vector<Token>& tokens) {
    zamba::write_token_file(base + name, tokens, TokenWidth::u16);
    return zamba::TokenFile::open(base + name, TokenWidth::u16, tokenizer.document_end());
  };
  const std::string_view prompt = documents[every / 2];
  Texts texts{file("train.tokens", train), file("held-out.tokens", held_out), {}, std::string(prompt.substr(0, 64))};
  std::printf("Text: %s, %.2f MB in %zu parts. Held out: every %zuth of them, %.0f KB.\n", options.text.c_str(),
              1e-6 * static_cast<double>(text.size()), documents.size(), every,
              1e-3 * static_cast<double>(held_out.size()));
  return texts;
}

zamba::TrainerOptions training() { return {.rows = size.rows, .length = size.length, .seed = {42}}; }

/// Pretraining on everything; annealing, re-warmed, on 60 % of the same and 40 % of the last tenth of the text, which
/// stands for the better data of a real run.
std::vector<zamba::Phase> phases(const TokenRange& all, const TokenRange& late, Index tokens) {
  constexpr double peak = size.rate;
  return {{.name = "pretraining",
           .tokens = tokens * 8 / 10,
           .rate = LearningRate::warm_up(peak, {.fraction = 0.04}).then(LearningRate::cosine(peak, 0.4 * peak)),
           .mixture = {{all, 1, "text"}}},
          {.name = "annealing",
           .tokens = tokens * 2 / 10,
           .rate = LearningRate::linear(0.4 * peak, 0.6 * peak)
                       .over({.fraction = 0.05})
                       .then(LearningRate::exponential(0.6 * peak, 0.01 * peak)),
           .mixture = {{all, 0.6, "replay of the text"}, {late, 0.4, "last tenth"}}}};
}

/// threads: of the CPU's.
template <class Ctx>
Ctx context_of(int threads) {
  if constexpr (std::is_constructible_v<Ctx, int>)
    return Ctx(threads);
  else
    return Ctx();
}

/// Tokens a second of a training step, over a few steps of a model that is thrown away.
template <class Net>
double training_speed(Context& ctx, const TokenRange& text) {
  ModelOf<Net> model(zamba::Seed{42});
  zamba::Trainer trainer(ctx, model, phases(text, text, 1'000'000), training());
  trainer.take_step();  // the first one allocates
  const auto begin = std::chrono::steady_clock::now();
  Index steps = 0;
  for (; steps < 4 || (seconds_since(begin) < 3 && steps < 50); ++steps) trainer.take_step();
  return static_cast<double>(steps * trainer.tokens_per_step()) / seconds_since(begin);
}

/// Tokens a second, one after the other through the cache, after a prompt of 256.
template <class Net>
double decoding_speed(Context& ctx, const ModelOf<Net>& model, const TokenRange& text) {
  std::vector<Token> prompt(256);
  text.file->copy(text.first, prompt);
  auto state = model.new_state({.max_length = 1024});
  std::chrono::steady_clock::time_point begin;
  Index count = 0;
  zamba::generate(ctx, model, state, prompt, {.max_new_tokens = 700}, [&](Index, Token) {
    if (++count == 1) begin = std::chrono::steady_clock::now();  // the first one is of the prompt
    return count < 16 || seconds_since(begin) < 1;
  });
  return static_cast<double>(count - 1) / seconds_since(begin);
}

template <class Net>
constexpr double cache_bytes_per_token = zamba::state_bytes<Net, Storage>(1, 1) - zamba::state_bytes<Net, Storage>(1,
                                                                                                                   0);

void print_table(const double (&training)[2], const double (&decoding)[2]) {
  const auto row = [](const char* name, double hybrid, double plain) {
    std::printf("  %-34s %14.0f %14.0f\n", name, hybrid, plain);
  };
  std::printf("\n  %-34s %14s %14s\n", "", "hybrid", "plain Mamba");
  row("parameters", zamba::parameter_count<Hybrid>, zamba::parameter_count<Plain>);
  row("active parameters a token", zamba::active_parameter_count<Hybrid>, zamba::active_parameter_count<Plain>);
  row("cache bytes a token", cache_bytes_per_token<Hybrid>, cache_bytes_per_token<Plain>);
  row("state bytes a sequence", zamba::state_bytes<Hybrid, Storage>(1, 0), zamba::state_bytes<Plain, Storage>(1, 0));
  row("training, tokens/s", training[0], training[1]);
  row("decoding, tokens/s", decoding[0], decoding[1]);
}

void print_sample(Context& ctx, const ModelOf<Hybrid>& model, const std::string& prompt) {
  const zamba::ByteTokenizer tokenizer;
  auto state = model.new_state({.max_length = 1024});
  std::printf("\nA sample, after [the first words of a held-out part]:\n\n[%s]", prompt.c_str());
  const zamba::GenerationOptions options{.sampling = {.temperature = 0.8, .top_p = 0.95},
                                         .max_new_tokens = 480,
                                         .stop_tokens = {tokenizer.document_end()},
                                         .seed = {7}};
  zamba::generate(ctx, model, state, tokenizer.encode(prompt), options, [&](Index, Token token) {
    if (token != tokenizer.document_end()) std::putchar(static_cast<char>(token));
    std::fflush(stdout);
    return true;
  });
  std::printf("\n");
}

void run(const Options& options) {
  const auto begin = std::chrono::steady_clock::now();
  const std::filesystem::path folder(options.folder), plan(folder / "tokens");
  std::filesystem::create_directories(folder);
  if (!options.resume)
    for (const char* name : {"checkpoint.safetensors", "log.jsonl"}) std::filesystem::remove(folder / name);
  Texts texts = prepare(options);
  const TokenRange all = TokenRange::whole(texts.train), held_out = TokenRange::whole(texts.held_out);
  texts.late = zamba::split(all, 0.1).held_out;

  Context ctx = context_of<Context>(options.threads);
  double training_speeds[2] = {training_speed<Hybrid>(ctx, all)}, decoding_speeds[2] = {};
  Index tokens = options.tokens;
  if (options.resume) {
    zamba::require(bool(std::ifstream(plan) >> tokens), "there is no run to resume in '", options.folder, "'");
  } else if (tokens == 0) {
    // Measuring what is held out takes a third of the time of training on as much.
    tokens = static_cast<Index>(training_speeds[0] * (60 * options.minutes - seconds_since(begin))) -
             measurements * held_out.size() / 3;
    tokens = std::max<Index>(tokens, 20'000);
  }
  zamba::replace_file(plan, [&](zamba::FileWriter& out) { out.write(std::to_string(tokens) + "\n"); });
  std::printf("Model: %.2f M parameters, %.2f M active a token; on %s, %.0f tokens/s. Training on %.2f M tokens.\n",
              1e-6 * zamba::parameter_count<Hybrid>, 1e-6 * zamba::active_parameter_count<Hybrid>, ctx.kind().c_str(),
              training_speeds[0], 1e-6 * static_cast<double>(tokens));

  ModelOf<Hybrid> model(zamba::Seed{42});
  zamba::TrainerOptions training_options = training();
  training_options.folder = folder;
  training_options.held_out = held_out;
  training_options.progress = &std::cerr;
  training_options.progress_fd = 2;
  training_options.checkpoint_every_steps = 400;
  training_options.evaluate_every_steps =
      tokens / (measurements - 2) / (training_options.rows * training_options.length);
  const auto both = phases(all, texts.late, tokens);
  zamba::Trainer trainer(ctx, model, both, training_options);
  const auto report = [&] {
    std::printf("  after %8ld tokens, %5.1f s: held-out text costs %.3f bits per byte\n",
                static_cast<long>(trainer.tokens()), seconds_since(begin), trainer.held_out_bits_per_byte());
    std::fflush(stdout);
  };
  report();
  while (!trainer.finished()) {
    trainer.run_phase();
    report();
  }

  print_sample(ctx, model, texts.first_words);
  training_speeds[1] = training_speed<Plain>(ctx, all);
  decoding_speeds[0] = decoding_speed<Hybrid>(ctx, model, held_out);
  decoding_speeds[1] = decoding_speed<Plain>(ctx, ModelOf<Plain>(zamba::Seed{42}), held_out);
  print_table(training_speeds, decoding_speeds);
  std::printf("\nLoss picture: %s\nCheckpoint:   %s\nIn all: %s\n", (folder / "loss.svg").c_str(),
              (folder / "checkpoint.safetensors").c_str(), zamba::format_duration(seconds_since(begin)).c_str());
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("A hybrid learns to write from a text: two phases of training, a sample, a table.");
  app.add_option("--text", options.text, "What to learn from: plain text, empty lines between its parts")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--folder", options.folder, "Where checkpoint, log and picture go")->capture_default_str();
  auto* const minutes =
      app.add_option("--minutes", options.minutes, "Time for training, which sets the number of tokens")
          ->capture_default_str()
          ->check(CLI::Range(0.1, 1e4));
  auto* const tokens = app.add_option("--tokens", options.tokens, "Train on so many tokens instead")
                           ->check(CLI::Range(10'000, 2'000'000'000))
                           ->excludes(minutes);
  if (std::is_same_v<Device, zamba::cpu>)
    app.add_option("--threads", options.threads, "0: as many as OpenMP finds")
        ->capture_default_str()
        ->check(CLI::Range(0, 1024));
  app.add_flag("--resume", options.resume, "Continue an interrupted run in the folder, to as many tokens as it had")
      ->excludes(minutes)
      ->excludes(tokens);
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
