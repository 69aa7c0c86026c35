// SPDX-License-Identifier: MIT
// zamba-info: what a model costs, from its type alone; no weights are read.
#pragma once

#include <cctype>
#include <charconv>
#include <filesystem>
#include <optional>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

#include <zamba/checkpoints/registry.hpp>
#include <zamba/io/line_plot.hpp>

#include "console.hpp"
#include "models.hpp"
#include "numbers.hpp"

namespace zamba_apps {

struct InfoOptions {
  std::string model, dtype = "auto", device = "cpu", svg;
  std::vector<Index> lengths{1024, 4096, 16384, 65536};
  std::string train;
  bool list = false;
};

/// The values of --train: ROWS,LENGTH[,KEEP].
inline zamba::TrainingShape training_shape(const std::string& text) {
  zamba::TrainingShape shape;
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  const auto number = [&](std::size_t i, const char* what) {
    Index value = 0;
    const std::string& part = parts[i];
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    constexpr Index most = Index{1} << 40;
    if (error != std::errc() || end != part.data() + part.size() || value < 1 || value > most)
      throw UsageError("--train: " + std::string(what) + " must be from 1 to " + std::to_string(most) + ", came '" +
                       part + "'");
    return value;
  };
  if (parts.size() < 2 || parts.size() > 3)
    throw UsageError("--train wants ROWS,LENGTH or ROWS,LENGTH,KEEP, came '" + text + "'");
  shape.rows = number(0, "the number of rows");
  shape.length = number(1, "their length");
  if (shape.rows > (Index{1} << 40) / shape.length)
    throw UsageError("--train: rows x length may be " + std::to_string(Index{1} << 40) + " tokens, came '" + text +
                     "'");
  if (parts.size() == 2 || parts[2] == "everything")
    shape.keep = zamba::Keep::everything;
  else if (parts[2] == "costly")
    shape.keep = zamba::Keep::costly;
  else if (parts[2] == "layer_inputs")
    shape.keep = zamba::Keep::layer_inputs;
  else
    throw UsageError("--train: KEEP is everything, costly or layer_inputs, came '" + parts[2] + "'");
  return shape;
}

inline void print_training(std::ostream& out, const zamba::ModelFacts& facts, const zamba::TrainingShape& shape) {
  if (!facts.training_bytes)
    zamba::fail("'", facts.name, "' on ", facts.device,
                " is not trained with kernels whose memory is known beforehand");
  const zamba::TrainingBytes bytes = facts.training_bytes(shape);
  out << "\nTraining with AdamW, micro-batches of " << grouped(shape.rows) << " x " << grouped(shape.length)
      << " tokens\n\n";
  const auto row = [](const char* what, std::size_t count) {
    return std::vector<std::string>{what, bytes_text(static_cast<double>(count))};
  };
  print_table(
      out, {row("weights", bytes.weights), row("gradients", bytes.gradients), row("moments", bytes.moments),
            row("activations", bytes.activations), row("workspace", bytes.workspace), row("together", bytes.total())});
}

/// A transformer to compare with: of the same width, whose layers hold 12 d^2 weights each (attention 4 d^2, a gated
/// MLP of width 8/3 d 8 d^2), as many layers as the model's weights beside its embedding make.
struct PlainTransformer {
  Index layers, bytes_per_position;

  explicit PlainTransformer(const zamba::ModelFacts& facts) {
    const Index d = facts.d_model, weights = facts.parameters - facts.vocabulary * d, layer = 12 * d * d;
    layers = std::max<Index>(1, (weights + layer / 2) / layer);
    bytes_per_position = layers * 2 * d * static_cast<Index>(zamba::size_of(facts.storage));  // a key and a value each
  }
};

inline std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

/// The model that a folder's config.json describes, or that is compiled in under a name.
inline const zamba::ModelFacts& find_model(const zamba::Registry& registry, const std::string& model,
                                           std::optional<zamba::DType> storage, const std::string& device) {
  check_device(registry, device);
  if (zamba::is_folder(model)) return registry.match(model, storage, device);
  std::vector<std::string> names;
  for (const zamba::ModelFacts& facts : registry.models()) {
    if (facts.device != device) continue;
    if (lower(facts.name) == lower(model) && (!storage || facts.storage == *storage)) return facts;
    names.push_back(facts.name);
  }
  const auto meant = nearest(model, names);
  zamba::fail("'", model, "' is no folder, and no model of that name is compiled in",
              storage ? " in " + std::string(name_of(*storage)) : "", zamba::detail::on_device(device),
              meant ? "; did you mean " + *meant + "?" : "", "; --list shows all");
}

inline void print_facts(std::ostream& out, const zamba::ModelFacts& facts, const std::vector<Index>& lengths) {
  const PlainTransformer plain(facts);
  const double element = static_cast<double>(zamba::size_of(facts.storage));
  const double read = static_cast<double>(facts.weight_bytes) +
                      element * static_cast<double>(facts.active_parameters - facts.parameters);
  out << facts.name << ", model_type " << facts.model_type << ", " << grouped(facts.layers) << " layers of width "
      << grouped(facts.d_model) << ", vocabulary " << grouped(facts.vocabulary) << ", weights in "
      << name_of(facts.storage) << "\n\n";
  print_table(out, {{"parameters", grouped(facts.parameters)},
                    {"parameters that a token meets", grouped(facts.active_parameters)},
                    {"FLOPs a token, without attention over what was before", grouped(facts.flops_per_token)},
                    {"weights in memory", bytes_text(static_cast<double>(facts.weight_bytes))},
                    {"weights read a decoded token, one sequence at a time", bytes_text(read)}});
  out << "\nState of one sequence, beside the cache of a transformer of the same width and as many parameters ("
      << plain.layers << " layers). Workspace: what computing takes here beside weights and state.\n\n";
  std::vector<std::vector<std::string>> rows{{"tokens", "state", "transformer", "share", "workspace"}};
  for (const Index length : lengths) {
    const double state = static_cast<double>(facts.state_bytes(1, length)),
                 cache = static_cast<double>(length * plain.bytes_per_position);
    rows.push_back({grouped(length), bytes_text(state), bytes_text(cache), rounded(100 * state / cache) + " %",
                    facts.workspace_bytes ? bytes_text(static_cast<double>(facts.workspace_bytes(1, length))) : "?"});
  }
  print_table(out, rows);
}

inline zamba::LinePlot state_plot(const zamba::ModelFacts& facts, Index longest) {
  const PlainTransformer plain(facts);
  zamba::LinePlot plot{
      .title = "State of one sequence",
      .x_label = "tokens",
      .curves = {{.name = facts.name}, {.name = "transformer, " + std::to_string(plain.layers) + " layers"}},
      .legend_left = true};
  const double most = static_cast<double>(longest * plain.bytes_per_position);
  const bool large = most >= 2e9;
  plot.y_label = large ? "GB" : "MB";
  for (int i = 0; i <= 64; ++i) {
    const Index length = longest * i / 64;
    const double x = static_cast<double>(length), unit = large ? 1e9 : 1e6;
    plot.curves[0].points.push_back({x, static_cast<double>(facts.state_bytes(1, length)) / unit});
    plot.curves[1].points.push_back({x, static_cast<double>(length * plain.bytes_per_position) / unit});
  }
  return plot;
}

inline int info(std::vector<std::string> arguments, const zamba::Registry& registry, Console& console) {
  InfoOptions options;
  CLI::App app("What a model costs: parameters, arithmetic, and the memory of its state against the length of a text.",
               "zamba-info");
  app.add_option("MODEL", options.model,
                 "folder of a checkpoint, of which only config.json is read; or a name of --list");
  add_dtype_flag(app, options.dtype);
  add_device_flag(app, options.device);
  app.add_option("--lengths", options.lengths, "numbers of tokens to show, as 1024,4096")
      ->delimiter(',')
      ->check(CLI::Range(Index{1}, Index{1} << 40))
      ->capture_default_str();
  app.add_option(
      "--train", options.train,
      "ROWS,LENGTH[,KEEP]: also the memory that training takes with micro-batches of so many rows of so many "
      "tokens; KEEP is everything, costly or layer_inputs");
  app.add_option("--svg", options.svg, "also draw the state against the length, up to the longest, into this file");
  app.add_flag("--list", options.list, "list the models that are compiled in");
  app.footer(
      "\nExamples:\n"
      "  zamba-info --list\n"
      "  zamba-info Zamba-7B-v1\n"
      "  zamba-info my-checkpoint --lengths 1000,100000 --svg state.svg");
  return run(app, std::move(arguments), console, [&] {
    if (options.list) {
      std::vector<std::vector<std::string>> rows{{"name", "model_type", "weights", "device", "parameters"}};
      for (const zamba::ModelFacts& facts : registry.models())
        rows.push_back({facts.name, facts.model_type, std::string(name_of(facts.storage)), std::string(facts.device),
                        grouped(facts.parameters)});
      return print_table(console.out, rows);
    }
    if (options.model.empty()) throw UsageError("MODEL is missing, a folder or a name");
    const zamba::ModelFacts& facts = find_model(registry, options.model, storage_of(options.dtype), options.device);
    std::optional<zamba::TrainingShape> shape;  // a mistake is told before anything is printed
    if (!options.train.empty()) shape = training_shape(options.train);
    print_facts(console.out, facts, options.lengths);
    if (shape) print_training(console.out, facts, *shape);
    if (options.svg.empty()) return;
    zamba::write_line_plot(options.svg,
                           state_plot(facts, *std::max_element(options.lengths.begin(), options.lengths.end())));
    console.out << "\nDrawn in " << options.svg << "\n";
  });
}

}  // namespace zamba_apps
