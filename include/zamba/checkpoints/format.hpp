// SPDX-License-Identifier: MIT
// CheckpointFormat<Net>: how a family of models is written in the Hugging Face layout.
//
//   config.json        keys whose values follow from the type
//   *.safetensors      one tensor a parameter, or several whose rows follow each other in it, under the family's names
//                      and in its order of rows
//
// A family is one header in checkpoints/, which specialises CheckpointFormat for the networks it describes:
//
//   template <MyNetwork Net>
//   struct CheckpointFormat<Net> {
//     static CheckpointLayout layout(const std::vector<ParameterEntry>& entries);
//   };
//
// Loader, saver and the comparison of gradients with a reference case follow from the layout.
//
// Keys that no type says stay with the model (Model::checkpoint_config): a model that was loaded is saved with the keys
// it came with. docs/checkpoints.md lists the keys of every family.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/model.hpp>
#include <zamba/op.hpp>

namespace zamba {

/// One key of config.json.
struct ConfigKey {
  using json = nlohmann::json;

  std::string key;
  json wanted;                      // what the type says; null: nothing
  std::optional<json> absent = {};  // what a file without the key means; none: the file must have it
  /// The value that a file stands for, where that is not simply the value of the key; null: the key is absent.
  json (*read)(const json& config, const json& wanted) = nullptr;
  json saved = {};                          // what is written; null: wanted
  std::vector<std::string> spellings = {};  // other names that releases give the key; each that is there must fit
  std::string note = {};                    // ends the line of a difference
  /// Further values that fit, as "mistral" for "llama": an object each, of what absent keys mean in files that have it.
  std::map<std::string, json> also = {};
  bool written = true;  // in the config.json of a model that was not loaded
};

/// A tensor of a file: a parameter, or some of its rows.
struct CheckpointTensor {
  std::string name;
  std::vector<Index> shape;              // as saved; loading ignores extents of 1
  std::vector<std::string> copies = {};  // names under which a file may hold the same values once more
  bool interleaved = false;              // file rows 2c and 2c + 1 are rows c and rows / 2 + c of ours
  bool save_copies = false;              // write them under those names, too

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
  nlohmann::json saved_only;                    // an object: what other programs expect of a model not loaded
  std::vector<CheckpointParameter> parameters;  // in the order of Model::entries()
  std::vector<std::string> derived = {};  // names of tensors that some files hold and the type implies: passed over
};

template <class Net>
struct CheckpointFormat {
  static_assert(
      detail::no_version_for<Net>,
      "zamba::CheckpointFormat: no checkpoint format is known for this network; include the header of its "
      "family in <zamba/checkpoints/>, or specialise CheckpointFormat as <zamba/checkpoints/format.hpp> says");
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
      require(!tensor.interleaved || size / cols % 2 == 0, "CheckpointLayout: ", tensor.name,
              " is interleaved, which wants an even number of rows, came ", size / cols);
      parts.push_back({&tensor, &entry, first, size / cols, cols});
      first += size / cols;
    }
    require(first == rows, "CheckpointLayout: parameter ", entry.name, " has ", rows, " rows, its parts hold ", first);
  }
  return parts;
}

/// Equal, and of the same JSON type. Numbers with a fraction to six digits: some programs write them through float.
inline bool same_value(const nlohmann::json& wanted, const nlohmann::json& found) {
  if (wanted.is_number_integer()) return found.is_number_integer() && wanted == found;
  if (!wanted.is_number_float()) return wanted == found;
  return found.is_number() && std::abs(wanted.get<double>() - found.get<double>()) <= 1e-6 * wanted.get<double>();
}

/// A value as a message has it: "none" for null.
inline std::string value_or_none(const nlohmann::json& value) { return value.is_null() ? "none" : value_text(value); }

/// What absent keys mean in this file, where that is not what ConfigKey::absent says.
inline nlohmann::json other_defaults(const nlohmann::json& config, const std::vector<ConfigKey>& keys) {
  for (const ConfigKey& key : keys)
    if (const auto at = config.find(key.key); at != config.end() && at->is_string())
      if (const auto other = key.also.find(at->get<std::string>()); other != key.also.end()) return other->second;
  return nlohmann::json::object();
}

/// One line for every key whose value in the file is not the type's.
inline std::vector<std::string> config_differences(const nlohmann::json& config, const std::vector<ConfigKey>& keys) {
  using json = nlohmann::json;
  std::vector<std::string> differences;
  const json defaults = other_defaults(config, keys);
  const auto compare = [&](const ConfigKey& key, const std::string& spelling, const json& in) {
    const json said = key.read ? key.read(in, key.wanted) : in.value(key.key, json());
    if (key.wanted.is_null() && said.is_null() && in.contains(key.key)) return;  // it says none
    const json meant = said.is_null() ? defaults.value(key.key, key.absent.value_or(json())) : said;
    if (same_value(key.wanted, meant) || (meant.is_string() && key.also.contains(meant.get<std::string>()))) return;
    const std::string file =
        said.is_null() && !meant.is_null() ? "none, which means " + value_text(meant) : value_or_none(said);
    differences.push_back(spelling + ": the type has " + value_or_none(key.wanted) + ", the file " + file + key.note);
  };
  const auto present = [&](const std::string& name) { return config.contains(name) && !config[name].is_null(); };
  for (const ConfigKey& key : keys) {
    const bool otherwise = std::any_of(key.spellings.begin(), key.spellings.end(), present);
    if (!otherwise || present(key.key)) compare(key, key.key, config);
    for (const std::string& spelling : key.spellings) {
      if (!present(spelling)) continue;
      json respelled = config;
      respelled[key.key] = config[spelling];
      compare(key, spelling, respelled);
    }
  }
  return differences;
}

/// Throws one Error with all differences.
inline void check_config(const nlohmann::json& config, const std::vector<ConfigKey>& keys, const std::string& origin) {
  Problems problems;
  for (const std::string& difference : config_differences(config, keys)) problems.add(difference);
  problems.check(origin + " does not describe this model:");
}

/// The text of a config.json as an object; one of mamba_ssm's own format is refused by name.
inline nlohmann::json parse_config(std::string_view text, const std::string& origin) {
  nlohmann::json config = parse_object(text, origin);
  require(config.contains("model_type") || !config.contains("d_model") || !config.contains("n_layer"), origin,
          " is of the original format of mamba_ssm (d_model, n_layer, ssm_cfg), not of Hugging Face's: take the "
          "repository of the same name that ends in -hf, or convert it by convert_mamba_ssm_checkpoint_to_pytorch.py "
          "or convert_mamba2_ssm_checkpoint_to_pytorch.py of transformers");
  return config;
}

/// Infinite numbers as the greatest float, which every release of transformers reads.
inline void bound_infinities(nlohmann::json& value) {
  if (value == infinite_number())
    value = std::numeric_limits<float>::max();
  else if (value.is_structured())
    for (nlohmann::json& part : value) bound_infinities(part);
}

/// The text of config.json: `loaded`, with which the model came, or where that is empty what the layout says. Keys of
/// `changes`, the text of an object, replace those. Throws where the result does not describe the layout's type.
inline std::string config_text(const CheckpointLayout& layout, std::string_view dtype, std::string_view loaded = {},
                               std::string_view changes = {}) {
  nlohmann::json config = layout.saved_only;
  if (loaded.empty()) {
    for (const ConfigKey& key : layout.config)
      if (key.written) config[key.key] = key.saved.is_null() ? key.wanted : key.saved;
  } else {
    config = parse_config(loaded, "Model::checkpoint_config");
    if (spell_infinities(loaded) != loaded) bound_infinities(config);
  }
  if (!changes.empty()) config.update(parse_object(changes, "SaveOptions::config"));
  if (!loaded.empty() || !changes.empty()) check_config(config, layout.config, "what config.json would say");
  // Both spellings are read by one release or another.
  const bool silent = !config.contains("dtype") && !config.contains("torch_dtype");
  for (const char* key : {"dtype", "torch_dtype"})
    if (silent || config.contains(key)) config[key] = dtype;
  return config.dump(2) + "\n";
}

/// A key that must say `wanted` or be absent.
inline ConfigKey fixed_key(std::string key, nlohmann::json wanted, std::string note = {}) {
  ConfigKey fixed{std::move(key), wanted, wanted};
  fixed.note = std::move(note);
  fixed.written = false;
  return fixed;
}

/// `keys` of a family, and those of every family that would change what is computed.
inline std::vector<ConfigKey> with_common_keys(std::vector<ConfigKey> keys) {
  for (const char* key : {"quantization_config", "compression_config"})
    keys.push_back(fixed_key(key, {}, "; quantised weights are not read"));
  keys.push_back(fixed_key("per_layer_config", {}, "; layers of one kind have one config here"));
  keys.push_back(fixed_key("pruned_heads", nlohmann::json::object(), "; every layer has all its heads here"));
  keys.push_back(fixed_key("is_encoder_decoder", false, "; there are no encoders here"));
  return keys;
}

}  // namespace detail

/// Throws unless the text of a config.json describes Net: one Error, with every key that differs, the type's value and
/// the file's.
template <class Net>
void check_config(std::string_view text, const std::string& origin = "config.json") {
  static const CheckpointLayout layout = CheckpointFormat<Net>::layout(detail::list_parameters<Net, float>());
  detail::check_config(detail::parse_config(text, origin), layout.config, origin);
}

/// The token ids under a key of a config.json, such as "eos_token_id": one, several, or none, where the key or the text
/// is absent. Negative ids, by which old files say none, are left out.
inline std::vector<Token> token_ids(std::string_view config, const std::string& key) {
  if (config.empty()) return {};
  nlohmann::json ids = detail::parse_object(config, "config.json").value(key, nlohmann::json());
  if (ids.is_null()) return {};
  if (!ids.is_array()) ids = nlohmann::json::array({std::move(ids)});
  std::vector<Token> tokens;
  for (const nlohmann::json& id : ids) {
    require(id.is_number_integer() && id <= std::numeric_limits<Token>::max(), "config.json: ", key,
            ": wanted token ids, came ", detail::value_text(id));
    if (id >= 0) tokens.push_back(id.get<Token>());
  }
  return tokens;
}

}  // namespace zamba
