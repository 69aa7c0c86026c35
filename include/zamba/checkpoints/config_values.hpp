// SPDX-License-Identifier: MIT
// Values of config.json that several families spell alike: how rope turns positions, and the limits of dt.
#pragma once

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/checkpoints/format.hpp>
#include <zamba/io/json.hpp>

namespace zamba::detail {

/// The base of the angles: in rope_parameters or rope_scaling, else beside them. Where both objects have one, the one
/// that does not fit.
inline nlohmann::json rope_theta_of(const nlohmann::json& config, const nlohmann::json& wanted) {
  nlohmann::json theta;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const auto rope = config.find(key);
    if (rope == config.end() || !rope->is_object()) continue;
    const nlohmann::json value = rope->value("rope_theta", nlohmann::json());
    if (!value.is_null() && (theta.is_null() || !same_value(wanted, value))) theta = value;
  }
  return theta.is_null() ? config.value("rope_theta", nlohmann::json()) : theta;
}

/// The type of rope_parameters; the whole object where it is "default" and something beside changes the angles.
inline nlohmann::json rope_type_of(const nlohmann::json& config, const nlohmann::json&) {
  const nlohmann::json given = config.value("rope_parameters", nlohmann::json());
  if (!given.is_object()) return given;
  const nlohmann::json older = given.value("type", nlohmann::json("default")), type = given.value("rope_type", older);
  if (type != "default") return type;
  for (const auto& [key, value] : given.items()) {
    const bool harmless = value.is_null() || key == "rope_theta" || key == "rope_type" ||
                          (key == "type" && value == type) || (key == "partial_rotary_factor" && value == 1);
    if (!harmless) return given;
  }
  return type;
}

/// A part of each head that rope turns, where that is not the whole.
inline nlohmann::json partial_rotary_of(const nlohmann::json& config, const nlohmann::json&) {
  const nlohmann::json factor = config.value("partial_rotary_factor", nlohmann::json());
  return factor == 1 ? nlohmann::json() : factor;
}

/// Rope of base `theta` over whole heads, in the spellings of all releases.
inline std::vector<ConfigKey> rope_keys(double theta) {
  ConfigKey type{"rope_parameters", "default", "default", rope_type_of};
  type.saved = {{"rope_theta", theta}, {"rope_type", "default"}};
  type.spellings = {"rope_scaling"};
  type.note = "; of rope's types only \"default\" is computed";
  ConfigKey partial = fixed_key("partial_rotary_factor", {}, "; rope turns whole heads here");
  partial.read = partial_rotary_of;
  return {{"rope_theta", theta, 10000.0, rope_theta_of}, std::move(type), std::move(partial)};
}

/// time_step_limit: the least dt, where the file has no greatest one. That may be infinite, spelled in one way or
/// another, or the greatest float.
inline nlohmann::json dt_limit_of(const nlohmann::json& config, const nlohmann::json&) {
  const nlohmann::json limit = config.value("time_step_limit", nlohmann::json());
  if (!limit.is_array() || limit.size() != 2 || !limit.front().is_number()) return limit;
  const nlohmann::json& most = limit.back();
  const bool none = most.is_number() ? most.get<double>() >= static_cast<double>(std::numeric_limits<float>::max())
                                     : most == infinite_number() || most == "Infinity";
  return none ? nlohmann::json{limit.front(), infinite_number()} : limit;
}

/// dt of at least `least`.
inline ConfigKey dt_limit_key(double least) {
  ConfigKey key{"time_step_limit", {least, infinite_number()}, nlohmann::json{0.0, infinite_number()}, dt_limit_of};
  key.saved = {least, std::numeric_limits<float>::max()};
  key.note = "; only a limit from below, Mamba2Config::dt_min, is computed";
  return key;
}

}  // namespace zamba::detail
