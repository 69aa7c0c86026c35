// SPDX-License-Identifier: MIT
// The comparison of the Zamba papers (arXiv 2405.16712 and 2411.15242) on the CPU: a transformer, Mamba, Zamba and
// Zamba2 of equal parameter count, with random weights: time to the first token, decode speed and cache bytes against
// the length of the context. Prints a table and draws a picture of each figure.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/blocks/transformer_block.hpp>
#include <zamba/io/line_plot.hpp>
#include <zamba/zamba.hpp>

namespace {

using namespace zamba;

constexpr Index vocabulary = 32000, d = 768;

using Transformer =
    LanguageModel<vocabulary,
                  UniformStack<11, TransformerBlock<TransformerConfig{.d_model = d, .n_heads = 12, .d_ff = 2048}>>>;
using Mamba = LanguageModel<vocabulary, UniformStack<20, MambaBlock<MambaConfig{.d_model = d, .d_state = 16}>>>;
using Zamba =
    LanguageModel<vocabulary,
                  HybridStack<16, 6, MambaBlock<MambaConfig{.d_model = d, .d_state = 16, .n_heads = 2}>,
                              SharedAttention<SharedAttentionConfig{.d_model = d, .n_heads = 12, .d_ff = 4 * d}>>>;
using Zamba2 = LanguageModel<
    vocabulary,
    HybridStack<
        16, 6, Mamba2Block<Mamba2Config{.d_model = d, .d_state = 64, .n_heads = 24}>,
        SharedAttention<SharedAttentionConfig{
            .d_model = d, .n_heads = 12, .d_ff = 4 * d, .rope = true, .rope_theta = 10000, .mlp_adapter_rank = 64}>>>;

/// Within 3 % of 100 M.
template <class Net>
inline constexpr bool of_equal_size = parameter_count<Net> > 97'000'000 && parameter_count<Net> < 103'000'000;
static_assert(of_equal_size<Transformer> && of_equal_size<Mamba> && of_equal_size<Zamba> && of_equal_size<Zamba2>);

/// What one model needs at one length of context.
struct Figures {
  Index context;
  double first_token, token;  // seconds
  double cache_bytes;
};

double seconds_of(auto&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The prompt once, then the median of 16 tokens.
template <class Net>
std::vector<Figures> measure(const char* name, const std::vector<Index>& contexts) {
  constexpr Index decoded = 16;
  const Model<Net> model(Seed{1});
  Context<cpu> ctx;
  std::vector<Figures> all;
  for (const Index context : contexts) {
    auto state = model.new_state({.batch = 1, .max_length = context + decoded});
    std::vector<Token> prompt(static_cast<std::size_t>(context));
    for (Index i = 0; i < context; ++i) prompt[i] = static_cast<Token>((i * 7919 + 13) % vocabulary);
    const double first_token = seconds_of([&] { model.extend(ctx, state, prompt); });
    std::vector<double> tokens;
    for (Index i = 0; i < decoded; ++i)
      tokens.push_back(seconds_of([&] { model.extend(ctx, state, static_cast<Token>(i)); }));
    std::nth_element(tokens.begin(), tokens.begin() + decoded / 2, tokens.end());
    all.push_back(
        {context, first_token, tokens[decoded / 2], static_cast<double>(state_bytes<Net, float>(1, context))});
    const Figures& now = all.back();
    std::printf("| %-11s | %6.1f | %6.1f | %7ld | %9.2f | %8.1f | %9.2f |\n", name,
                static_cast<double>(parameter_count<Net>) * 1e-6,
                static_cast<double>(active_parameter_count<Net>) * 1e-6, static_cast<long>(now.context),
                now.first_token, 1 / now.token, now.cache_bytes / 1e6);
    std::fflush(stdout);
  }
  return all;
}

void draw(const std::filesystem::path& file, const char* title, const char* unit,
          const std::vector<std::pair<const char*, std::vector<Figures>>>& models, auto&& value, bool legend_left) {
  LinePlot plot;
  plot.title = title;
  plot.x_label = "context, tokens";
  plot.y_label = unit;
  plot.legend_left = legend_left;
  for (const auto& [name, figures] : models) {
    PlotCurve curve;
    curve.name = name;
    curve.markers = true;
    for (const Figures& f : figures) curve.points.push_back({static_cast<double>(f.context), value(f)});
    plot.curves.push_back(std::move(curve));
  }
  write_line_plot(file, plot);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Transformer, Mamba, Zamba and Zamba2 of 100 M parameters each, with random weights, on the CPU.");
  std::filesystem::path folder = ".";
  Index longest = 32768;
  app.add_option("--folder", folder, "Where the pictures go")->capture_default_str()->check(CLI::ExistingDirectory);
  app.add_option("--longest", longest, "Contexts from 512 on, by factors of 4 and up to this")
      ->capture_default_str()
      ->check(CLI::Range(512, 1 << 20));
  CLI11_PARSE(app, argc, argv);

  std::vector<Index> contexts;
  for (Index context = 512; context <= longest; context *= 4) contexts.push_back(context);
  if (contexts.back() < longest) contexts.push_back(longest);

  try {
    std::printf(
        "| model | M parameters | active, M | context | first token, s | tokens/s after it | state and cache, MB |\n"
        "|---|---|---|---|---|---|---|\n");
    const std::vector<std::pair<const char*, std::vector<Figures>>> models = {
        {"transformer", measure<Transformer>("transformer", contexts)},
        {"Mamba", measure<Mamba>("Mamba", contexts)},
        {"Zamba", measure<Zamba>("Zamba", contexts)},
        {"Zamba2", measure<Zamba2>("Zamba2", contexts)}};
    draw(
        folder / "comparison_first_token.svg", "Time to the first token", "seconds", models,
        [](const Figures& f) { return f.first_token; }, true);
    draw(
        folder / "comparison_decode.svg", "Decode, batch 1", "tokens a second", models,
        [](const Figures& f) { return 1 / f.token; }, false);
    draw(
        folder / "comparison_cache.svg", "State and cache of one sequence, float32", "MB", models,
        [](const Figures& f) { return f.cache_bytes / 1e6; }, true);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
