// SPDX-License-Identifier: MIT
// What tests of training share: a text, phases over it, options, and the weights of a model to compare.
#pragma once

#include <filesystem>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/train/phase.hpp>
#include <zamba/train/trainer_options.hpp>

#include "tests/support/temporary_folder.hpp"

namespace zamba_test {

using namespace zamba;

/// A text that can be learnt: documents of a counting token, ended by token 0.
struct Text {
  explicit Text(Index size) {
    Random random(Seed{7}, 0);
    std::vector<Token> tokens;
    while (static_cast<Index>(tokens.size()) < size) {
      const Index first = 1 + random.below(20), count = 3 + random.below(40);
      for (Index i = 0; i < count; ++i) tokens.push_back(static_cast<Token>(1 + (first + i) % 28));
      tokens.push_back(0);
    }
    write_token_file(folder.path / "text", tokens, TokenWidth::u16);
    file = TokenFile::open(folder.path / "text", TokenWidth::u16, 0);
    parts = split(TokenRange::whole(*file), 0.1);
  }
  TemporaryFolder folder;
  std::optional<TokenFile> file;
  TrainHeldOut parts;
};

inline std::vector<Phase> two_phases(const Text& text, Index tokens) {
  const TokenRange all = text.parts.train, late{all.file, all.size() / 2, all.last};
  return {{"pretraining",
           tokens,
           LearningRate::warm_up(4e-3, {.fraction = 0.1}).then(LearningRate::cosine(4e-3, 2e-3)),
           {{all, 1, "text"}}},
          {"annealing",
           tokens / 2,
           LearningRate::linear(2e-3, 3e-3).over({.fraction = 0.1}).then(LearningRate::exponential(3e-3, 1e-4)),
           {{all, 0.6, "replay"}, {late, 0.4, "late"}}}};
}

inline TrainerOptions small(const std::filesystem::path& folder = {}) {
  return {.rows = 2, .length = 24, .accumulation = 2, .seed = {9}, .folder = folder};
}

/// What the elements of a parameter are stepped as: masters, or the weights themselves.
template <class ModelType, class Optimiser>
std::vector<double> masters_of(const ModelType& model, const Optimiser& optimiser, const ParameterEntry& entry) {
  if (!optimiser.splits_weights || entry.precise) return model.read(entry);
  std::vector<float> values(static_cast<std::size_t>(entry.size));
  optimiser.read_masters(model, entry, 0, values);
  return {values.begin(), values.end()};
}

/// All weights of a model.
template <class ModelType>
std::vector<double> weights_of(const ModelType& model) {
  std::vector<double> all;
  for (const ParameterEntry& entry : model.entries())
    for (const double value : model.read(entry)) all.push_back(value);
  return all;
}

template <class ModelType>
const ParameterEntry& entry_of(const ModelType& model, const std::string& name) {
  for (const ParameterEntry& entry : model.entries())
    if (entry.name == name) return entry;
  fail("no parameter ", name);
}

/// The lines of a run's log, but for what differs from run to run.
inline std::string log_without_times(const std::filesystem::path& path) {
  std::string text;
  std::istringstream all(read_text(path));
  for (std::string line; std::getline(all, line);) {
    auto record = nlohmann::json::parse(line);
    record.erase("time");
    text += record.dump() + "\n";
  }
  return text;
}

/// The message of the error that f throws; empty: none.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace zamba_test
