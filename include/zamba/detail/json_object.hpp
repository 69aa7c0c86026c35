// SPDX-License-Identifier: MIT
// JSON files of others: parsed within bounds, and their values as parts of messages.
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/detail/problems.hpp>
#include <zamba/error.hpp>

namespace zamba::detail {

inline constexpr std::size_t longest_json = 16 << 20;
inline constexpr int deepest_json = 64;
inline constexpr std::size_t most_ordered_keys = 1024;  // of an object that keeps their order: a key is searched there

/// A JSON value as part of a message: bounded.
inline std::string value_text(const nlohmann::json& value) {
  constexpr std::size_t longest = 120;
  std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return text.size() > longest ? text.substr(0, longest) + "..." : text;
}

/// An infinite number, as transformers spells it now.
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

/// Text as a JSON object in which no key occurs twice, with its keys in their order where Json is ordered_json. Nesting
/// is bounded here, since values are compared and printed recursively.
template <class Json = nlohmann::json>
Json parse_object(std::string_view text, const std::string& origin) {
  using json = Json;
  require(text.size() <= longest_json, origin, ": at most ", longest_json, " bytes are allowed, came ", text.size());
  // The JSON parser takes a zero byte for the end of its input.
  require(text.find('\0') == text.npos, origin, ": not valid JSON: it holds a zero byte");
  std::vector<std::set<std::string>> keys;  // of the objects around what is met
  const auto check = [&](int depth, typename json::parse_event_t event, const json& met) {
    require(depth <= deepest_json, origin, ": nested deeper than ", deepest_json, " levels");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = met.template get_ref<const std::string&>();
      require(keys.back().insert(key).second, origin, ": key ", quote(key), " occurs twice");
      require(std::is_same_v<Json, nlohmann::json> || keys.back().size() <= most_ordered_keys, origin,
              ": an object may have ", most_ordered_keys, " keys");
    }
    return true;
  };
  json object;
  try {
    object = json::parse(spell_infinities(text), check);
  } catch (const typename json::exception& error) {
    fail(origin, ": not valid JSON: ", quote(error.what()));
  }
  require(object.is_object(), origin, ": wanted a JSON object, came ", object.type_name());
  return object;
}

}  // namespace zamba::detail
