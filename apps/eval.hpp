// SPDX-License-Identifier: MIT
// zamba-eval: the perplexity of a text, and files of multiple-choice questions.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <zamba/eval/multiple_choice_file.hpp>
#include <zamba/eval/perplexity.hpp>

#include "models.hpp"
#include "numbers.hpp"
#include "text.hpp"

namespace zamba_apps {

struct EvalOptions {
  ModelOptions model;
  std::string text, shots, output;
  std::vector<std::string> items;
  Index length = 2048, stride = 0, n_shot = 0, limit = 0;
  bool no_begin = false;
};

inline void add_eval_flags(CLI::App& app, EvalOptions& o) {
  o.model.add_to(app);
  app.add_option("--text", o.text, "text whose perplexity is measured");
  app.add_option("--length", o.length, "tokens that a window of the text has")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--stride", o.stride, "tokens by which windows advance; 0: a whole window")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--items", o.items,
                 "JSON-lines files of ARC, HellaSwag, MMLU, PIQA or Winogrande, told by their fields");
  app.add_option("--n-shot", o.n_shot, "solved items before each question")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--shots", o.shots,
                 "file whose first items are the solved ones; else the first of each file of items, "
                 "which are not asked then");
  app.add_option("--limit", o.limit, "ask only the first so many items of each file; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--output", o.output, "JSON-lines file of every item's scores, written whole or not at all");
  app.add_flag("--no-begin", o.no_begin, "do not begin each window and prompt with the token that begins a text");
  app.footer(
      "\nExamples:\n"
      "  zamba-eval my-model --text held-out.txt --length 4096 --stride 1024\n"
      "  zamba-eval my-model --items piqa.jsonl winogrande.jsonl --limit 200\n"
      "  zamba-eval my-model --items arc.jsonl --n-shot 25 --shots arc-train.jsonl --output scores.jsonl");
}

/// "0.765 +- 0.012".
inline std::string accuracy_text(const zamba::Accuracy& accuracy) {
  char text[64];
  std::snprintf(text, sizeof text, "%.4f +- %.4f", accuracy.value(), accuracy.standard_error());
  return text;
}

inline nlohmann::ordered_json to_json(const zamba::ItemResult& result) {
  nlohmann::ordered_json choices = nlohmann::ordered_json::array();
  for (const zamba::ChoiceScore& score : result.choices)
    choices.push_back(
        {{"log_likelihood", score.log_likelihood}, {"tokens", score.tokens}, {"characters", score.characters}});
  return {{"item", result.name},
          {"answer", result.answer},
          {"pick", result.pick()},
          {"pick_per_character", result.pick_per_character()},
          {"pick_per_token", result.pick_per_token()},
          {"choices", choices}};
}

inline void eval_text(const zamba::AnyModel& model, const Text& text, const EvalOptions& options,
                      const std::string& read, Console& console) {
  const std::vector<Token> tokens = text.encode(read);
  zamba::WindowOptions windows{.length = options.length, .stride = options.stride};
  if (!options.no_begin) windows.begin = text.begin();
  const auto loss = zamba::text_loss(model, tokens, windows, Watch(console, options.text));
  const double bytes_per_token = static_cast<double>(read.size()) / static_cast<double>(tokens.size());
  console.out << options.text << "\n";
  print_table(console.out, {{"  bytes", grouped(static_cast<Index>(read.size()))},
                            {"  tokens judged", grouped(loss.count)},
                            {"  nats a token", rounded(loss.mean())},
                            {"  perplexity", rounded(zamba::perplexity(loss))},
                            {"  bits a byte", rounded(zamba::bits_per_byte(loss, bytes_per_token))}});
}

/// The items of a file that are asked, and what is solved before them.
struct Questions {
  std::vector<zamba::MultipleChoiceItem> items, shots;
};

inline Questions read_questions(const std::string& path, const EvalOptions& options) {
  Questions questions{zamba::read_multiple_choice(path), {}};
  auto& items = questions.items;
  const auto count = [&](Index n) { return items.begin() + std::min<Index>(n, static_cast<Index>(items.size())); };
  if (!options.shots.empty()) {
    questions.shots = zamba::read_multiple_choice(options.shots);
  } else if (options.n_shot > 0) {
    const auto end = count(options.n_shot);
    questions.shots.assign(items.begin(), end);
    items.erase(items.begin(), end);
    zamba::require(!items.empty(), "'", path, "' holds no items beside the ", questions.shots.size(), " solved ones");
  }
  if (options.limit > 0) items.erase(count(options.limit), items.end());
  return questions;
}

inline int eval(std::vector<std::string> arguments, const zamba::Registry& registry, Console& console) {
  EvalOptions options;
  CLI::App app("How well a model predicts: the perplexity of a text, and multiple-choice questions.", "zamba-eval");
  add_eval_flags(app, options);
  return run(app, std::move(arguments), console, [&] {
    if (options.model.directory.empty()) throw UsageError("DIR is missing, the folder of the model");
    if (options.text.empty() && options.items.empty()) throw UsageError("wanted --text or --items, came neither");
    // Everything is read before the weights, which take a while.
    const std::string read = options.text.empty() ? "" : read_text_file(options.text);
    zamba::require(options.text.empty() || !read.empty(), "'", options.text, "' is empty");
    std::vector<Questions> questions;
    for (const std::string& path : options.items) questions.push_back(read_questions(path, options));

    const zamba::AnyModel model = options.model.load(registry, console);
    const Text text(options.model.directory, model.vocabulary());
    if (text.of_bytes()) console.err << "no tokenizer.json: a byte is a token\n";
    if (!options.text.empty()) eval_text(model, text, options, read, console);

    std::vector<std::vector<std::string>> table{{"items", "asked", "accuracy", "per character", "per token"}};
    std::string lines;
    for (std::size_t i = 0; i < questions.size(); ++i) {
      zamba::MultipleChoiceOptions choice;
      if (!options.no_begin) choice.begin = text.begin();
      const auto results = zamba::multiple_choice(
          model, [&](std::string_view part) { return text.encode(part); }, questions[i].items, questions[i].shots,
          options.n_shot, choice, Watch(console, options.items[i]));
      using zamba::ItemResult;
      table.push_back({options.items[i], grouped(static_cast<Index>(results.size())),
                       accuracy_text(zamba::accuracy(results)),
                       accuracy_text(zamba::accuracy(results, &ItemResult::pick_per_character)),
                       accuracy_text(zamba::accuracy(results, &ItemResult::pick_per_token))});
      for (const ItemResult& result : results) lines += to_json(result).dump() + "\n";
    }
    if (!options.output.empty())
      zamba::replace_file(options.output, [&](zamba::FileWriter& out) { out.write(std::string_view(lines)); });
    if (!questions.empty()) print_table(console.out, table);
  });
}

}  // namespace zamba_apps
