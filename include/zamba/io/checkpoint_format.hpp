// SPDX-License-Identifier: MIT
// CheckpointFormat<Net>: how a family of models is written in the Hugging Face layout.
//
//   config.json        keys whose values follow from the type
//   *.safetensors      one tensor a parameter, or several whose rows follow each other in it, under the family's names
//                      and in its order of rows
//
// A family is one header in models/, which specialises CheckpointFormat for the networks it describes:
//
//   template <MyNetwork Net>
//   struct CheckpointFormat<Net> {
//     static CheckpointLayout layout(const std::vector<ParameterEntry>& entries);
//   };
//
// Loader, saver and the comparison of gradients with a reference case follow from the layout.
#pragma once

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/model.hpp>
#include <zamba/op.hpp>

namespace zamba {

/// One key of config.json.
struct ConfigKey {
  using json = nlohmann::json;

  std::string key;
  json wanted;                      // what the type says
  std::optional<json> absent = {};  // what a file without the key means; none: the file must have it
  /// The value that a file stands for, where that is not simply the value of the key; null: the key is absent.
  json (*read)(const json& config, const json& wanted) = nullptr;
  json saved = {};  // what is written; null: wanted
};

/// A tensor of a file: a parameter, or some of its rows.
struct CheckpointTensor {
  std::string name;
  std::vector<Index> shape;              // as saved; loading ignores extents of 1
  std::vector<std::string> copies = {};  // names under which a file may hold the same values once more
  bool interleaved = false;              // file rows 2c and 2c + 1 are rows c and rows / 2 + c of ours

  /// The row of the file's tensor that holds our row `row` of `rows`.
  Index file_row(Index row, Index rows) const {
    if (!interleaved) return row;
    return row < rows / 2 ? 2 * row : 2 * (row - rows / 2) + 1;
  }
};

/// Where files hold one parameter: its rows are those of the parts, one part after the other. Nearly all have one part;
/// a parameter gate_up (2 d_ff, d) may have {"gate_proj.weight", {d_ff, d}} and {"up_proj.weight", {d_ff, d}}.
struct CheckpointParameter {
  std::vector<CheckpointTensor> parts;

  CheckpointParameter(CheckpointTensor whole) : parts{std::move(whole)} {}
  CheckpointParameter(std::vector<CheckpointTensor> parts_in_order) : parts(std::move(parts_in_order)) {}
};

/// What the files of one network look like.
struct CheckpointLayout {
  std::vector<ConfigKey> config;                // compared on loading, written on saving
  nlohmann::json saved_only;                    // an object: further keys that others' programs expect
  std::vector<CheckpointParameter> parameters;  // in the order of Model::entries()
};

template <class Net>
struct CheckpointFormat {
  static_assert(detail::no_version_for<Net>,
                "zamba::CheckpointFormat: no checkpoint format is known for this network; include the header of its "
                "family in <zamba/models/>, or specialise CheckpointFormat as <zamba/io/checkpoint_format.hpp> says");
};

namespace detail {

/// A tensor of a file as rows [first, first + rows) of a parameter, each of `cols` elements.
struct ParameterPart {
  const CheckpointTensor* tensor;
  const ParameterEntry* entry;
  Index first, rows, cols;
};

/// The parts of all parameters, in order. They refer to both arguments.
inline std::vector<ParameterPart> parameter_parts(const std::vector<ParameterEntry>& entries,
                                                  const CheckpointLayout& layout) {
  require(layout.parameters.size() == entries.size(), "CheckpointLayout: ", entries.size(), " parameters wanted, came ",
          layout.parameters.size());
  std::vector<ParameterPart> parts;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const ParameterEntry& entry = entries[i];
    const Index rows = entry.shape.front(), cols = entry.size / rows;
    Index first = 0;
    for (const CheckpointTensor& tensor : layout.parameters[i].parts) {
      const Index size = std::accumulate(tensor.shape.begin(), tensor.shape.end(), Index{1}, std::multiplies<>());
      require(size % cols == 0, "CheckpointLayout: ", tensor.name, " must hold whole rows of ", cols,
              " elements of parameter ", entry.name, ", came ", size, " elements");
      parts.push_back({&tensor, &entry, first, size / cols, cols});
      first += size / cols;
    }
    require(first == rows, "CheckpointLayout: parameter ", entry.name, " has ", rows, " rows, its parts hold ", first);
  }
  return parts;
}

inline constexpr std::size_t longest_config = 16 << 20;
inline constexpr int deepest_config = 64;

/// A JSON value as part of a message: bounded.
inline std::string value_text(const nlohmann::json& value) {
  constexpr std::size_t longest = 120;
  std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return text.size() > longest ? text.substr(0, longest) + "..." : text;
}

/// An infinite number in a config.json, as transformers spells it now.
inline nlohmann::json infinite_number() { return {{"__float__", "Infinity"}}; }

/// `text` with the bare word Infinity, which Python writes and JSON does not know, in that spelling.
inline std::string spell_infinities(std::string_view text) {
  constexpr std::string_view word = "Infinity";
  std::string spelled;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (!quoted && text.substr(i, word.size()) == word) {
      spelled += infinite_number().dump();
      i += word.size() - 1;
      continue;
    }
    spelled += text[i];
    if (text[i] == '"')
      quoted = !quoted;
    else if (quoted && text[i] == '\\' && i + 1 < text.size())
      spelled += text[++i];
  }
  return spelled;
}

/// Text as a JSON object. Nesting is bounded here, since values are compared and printed recursively.
inline nlohmann::json parse_config(std::string_view text, const std::string& origin) {
  using json = nlohmann::json;
  require(text.size() <= longest_config, origin, ": at most ", longest_config, " bytes are allowed, came ",
          text.size());
  // The JSON parser takes a zero byte for the end of its input.
  require(text.find('\0') == text.npos, origin, ": not valid JSON: it holds a zero byte");
  json config;
  try {
    config = json::parse(spell_infinities(text), [&](int depth, json::parse_event_t, json&) {
      require(depth <= deepest_config, origin, ": nested deeper than ", deepest_config, " levels");
      return true;
    });
  } catch (const json::exception& error) {
    fail(origin, ": not valid JSON: ", quote(error.what()));
  }
  require(config.is_object(), origin, ": wanted a JSON object, came ", config.type_name());
  return config;
}

/// Equal, and of the same JSON type. Numbers with a fraction to six digits: some programs write them through float.
inline bool same_value(const nlohmann::json& wanted, const nlohmann::json& found) {
  if (wanted.is_number_integer()) return found.is_number_integer() && wanted == found;
  if (!wanted.is_number_float()) return wanted == found;
  return found.is_number() && std::abs(wanted.get<double>() - found.get<double>()) <= 1e-6 * wanted.get<double>();
}

/// One line for every key whose value in the file is not the type's.
inline std::vector<std::string> config_differences(const nlohmann::json& config, const std::vector<ConfigKey>& keys) {
  using json = nlohmann::json;
  std::vector<std::string> differences;
  for (const ConfigKey& key : keys) {
    const auto at = config.find(key.key);
    json found = key.read ? key.read(config, key.wanted) : at != config.end() ? *at : json();
    if (found.is_null() && key.absent) found = *key.absent;
    if (same_value(key.wanted, found)) continue;
    differences.push_back(key.key + ": the type has " + value_text(key.wanted) + ", the file " +
                          (found.is_null() ? std::string("none") : value_text(found)));
  }
  return differences;
}

/// Throws one Error with all differences.
inline void check_config(const nlohmann::json& config, const std::vector<ConfigKey>& keys, const std::string& origin) {
  std::string problems;
  for (const std::string& difference : config_differences(config, keys)) problems += "\n  " + difference;
  require(problems.empty(), origin, " does not describe this model:", problems);
}

/// The text of config.json.
inline std::string config_text(const CheckpointLayout& layout, std::string_view dtype) {
  nlohmann::json config = layout.saved_only;
  for (const ConfigKey& key : layout.config) config[key.key] = key.saved.is_null() ? key.wanted : key.saved;
  config["dtype"] = config["torch_dtype"] = dtype;  // both spellings are read by one release or another
  return config.dump(2) + "\n";
}

}  // namespace detail

/// Throws unless the text of a config.json describes Net: one Error, with every key that differs, the type's value and
/// the file's.
template <class Net>
void check_config(std::string_view text, const std::string& origin = "config.json") {
  static const CheckpointLayout layout = CheckpointFormat<Net>::layout(detail::list_parameters<Net, float>());
  detail::check_config(detail::parse_config(text, origin), layout.config, origin);
}

}  // namespace zamba
