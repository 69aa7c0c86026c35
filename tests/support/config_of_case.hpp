// SPDX-License-Identifier: MIT
// The config.json of a reference case with changes, against the type of the case.
#pragma once

#include <algorithm>
#include <string>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <zamba/checkpoints/huggingface.hpp>

#include "cases.hpp"

namespace zamba_test {

template <class Net>
class ConfigOfCase {
 public:
  using json = nlohmann::json;

  explicit ConfigOfCase(const std::string& name)
      : name_(name), config_(json::parse(read_text(case_path(name) / "config.json"))) {}

  const json& config() const { return config_; }

  /// What check_config says of the case's config with some keys replaced; null removes a key.
  std::string refusal(const json& replaced) const {
    json config = config_;
    for (const auto& [key, value] : replaced.items()) {
      if (value.is_null())
        config.erase(key);
      else
        config[key] = value;
    }
    return refusal_of_text(config.dump());
  }
  std::string refusal_of_text(const std::string& text) const {
    return message_of([&] { check_config<Net>(text); });
  }

  /// The case's own config is accepted, and each of the keys with a wrong value refused, by its name alone.
  void compares(const json& wrong) const {
    CHECK(refusal(json::object()) == "");
    for (const auto& item : wrong.items()) {
      const std::string key = item.key(), alone = refusal({{key, item.value()}});
      CAPTURE(key);
      CHECK(contains(alone, "\n  " + key + ": the type has "));
      CHECK(std::count(alone.begin(), alone.end(), '\n') == 1);
    }
  }

  /// Saved, the case has the same tensors and the config it came with; a model that was not loaded has one that the
  /// type accepts, with the values of the case's.
  void round_trip() const {
    const TemporaryFolder folder;
    const auto model = load_huggingface<Net, float>(case_path(name_));
    save_huggingface(model, folder.path);
    CHECK(HeldTensors(folder.path / "model.safetensors").tensors ==
          HeldTensors(case_path(name_) / "model.safetensors").tensors);
    CHECK(json::parse(read_text(folder.path / "config.json")) == config_);

    const auto layout = CheckpointFormat<Net>::layout(model.entries());
    const std::string text = detail::config_text(layout, "float32");
    CHECK(refusal_of_text(text) == "");
    const json fresh = json::parse(text);
    for (const ConfigKey& key : layout.config) {
      CAPTURE(key.key);
      REQUIRE(fresh.contains(key.key) == key.written);
      if (key.written && !key.read) CHECK(fresh[key.key] == config_[key.key]);
    }
  }

 private:
  std::string name_;
  json config_;
};

}  // namespace zamba_test
