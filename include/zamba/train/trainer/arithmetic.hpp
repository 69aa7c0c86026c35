// SPDX-License-Identifier: MIT
// What decides the numbers of a run, as texts of its checkpoints: a run is continued where they are the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <set>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/error.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/parameter_table.hpp>
#include <zamba/train/trainer_options.hpp>

namespace zamba::detail {

/// The shortest text that reads back as the same number.
template <class Number>
std::string number_text(Number value) {
  return nlohmann::json(value).dump();
}

/// The rates of groups as they meet the parameters, whose order the architecture fixes: "0.1 from
/// shared.0.q_proj.weight, frozen from layers.0.linear.weight, ...".
inline std::string text_of_rates(const std::vector<ParameterEntry>& entries, const std::vector<double>& rates) {
  std::string text;
  for (std::size_t i = 0; i < rates.size(); ++i)
    if (i == 0 || rates[i] != rates[i - 1])
      text.append(i > 0 ? ", " : "")
          .append(rates[i] == 0 ? "frozen" : number_text(rates[i]))
          .append(" from ")
          .append(entries[i].name);
  return text;
}

/// Of the options and of the rates that their groups come to.
inline Metadata arithmetic_of(const TrainerOptions& options, const std::vector<ParameterEntry>& entries,
                              const std::vector<double>& rates) {
  const AdamWOptions& adamw = options.adamw;
  Metadata text{{"rows", std::to_string(options.rows)},
                {"length", std::to_string(options.length)},
                {"accumulation", std::to_string(options.accumulation)},
                {"seed", std::to_string(options.seed.value)},
                {"z_loss", number_text(options.z_loss)},
                {"adamw.beta1", number_text(adamw.beta1)},
                {"adamw.beta2", number_text(adamw.beta2)},
                {"adamw.eps", number_text(adamw.eps)},
                {"adamw.weight_decay", number_text(adamw.weight_decay)},
                {"adamw.clip_norm", number_text(adamw.clip_norm)}};
  if (std::any_of(rates.begin(), rates.end(), [](double rate) { return rate != 1; }))
    text["adamw.groups"] = text_of_rates(entries, rates);
  return text;
}

/// Throws, with all that differs, unless a checkpoint was made by the arithmetic that is `now`.
inline void check_arithmetic(const Safetensors& file, const Metadata& now) {
  const Metadata& then = file.metadata();
  const auto text = [](const Metadata& all, const std::string& key) {
    const auto found = all.find(key);
    return found == all.end() ? std::string("nothing") : "'" + found->second + "'";
  };
  std::set<std::string> keys{"adamw.groups"};  // which either may lack
  for (const auto& entry : now) keys.insert(entry.first);
  std::string differences;
  for (const std::string& key : keys)
    if (text(then, key) != text(now, key))
      differences += "\n  " + key + ": " + text(then, key) + " in the checkpoint, " + text(now, key) + " now";
  require(differences.empty(), "Trainer: '", file.origin(),
          "' was made with other options, and would not be continued exactly:", differences,
          "\nGive the same options, or another folder and this file as start_from: that takes the weights alone, and "
          "begins with new moments, at step 0 of the phases.");
}

}  // namespace zamba::detail
