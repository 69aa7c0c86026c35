// SPDX-License-Identifier: MIT
// JSON files of others: parsed within bounds, and their values as parts of messages.
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/error.hpp>
#include <zamba/io/problems.hpp>

namespace zamba::detail {

inline constexpr std::size_t longest_json = 16 << 20;
inline constexpr std::size_t deepest_json = 64;
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

/// Looks at JSON without keeping it, as the events of the parser come. Nesting is bounded here, since values are
/// compared and printed recursively. (The parser's own callback would take quadratic time for many objects in one
/// array.)
class JsonCheck {
 public:
  using json = nlohmann::json;

  /// most_keys: that an object may have; 0: any number.
  JsonCheck(const std::string& origin, std::size_t most_keys) : origin_(origin), most_keys_(most_keys) {}

  bool null() { return true; }
  bool boolean(bool) { return true; }
  bool number_integer(json::number_integer_t) { return true; }
  bool number_unsigned(json::number_unsigned_t) { return true; }
  bool number_float(json::number_float_t, const std::string&) { return true; }
  bool string(std::string&) { return true; }
  bool binary(json::binary_t&) { return true; }
  bool start_object(std::size_t) { return open(); }
  bool start_array(std::size_t) { return open(); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& name) {
    std::set<std::string>& keys = keys_.back();
    require(keys.insert(name).second, origin_, ": key ", quote(name), " occurs twice");
    require(most_keys_ == 0 || keys.size() <= most_keys_, origin_, ": an object may have ", most_keys_, " keys");
    return true;
  }
  [[noreturn]] bool parse_error(std::size_t, const std::string&, const json::exception& error) {
    fail(origin_, ": not valid JSON: ", quote(error.what()));
  }

 private:
  bool open() {
    require(keys_.size() < deepest_json, origin_, ": nested deeper than ", deepest_json, " levels");
    keys_.emplace_back();
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  const std::string& origin_;
  std::size_t most_keys_;
  std::vector<std::set<std::string>> keys_;  // of the objects and, without any, the arrays around what is met
};

/// Text as a JSON object in which no key occurs twice, with its keys in their order where Json is ordered_json.
template <class Json = nlohmann::json>
Json parse_object(std::string_view text, const std::string& origin) {
  require(text.size() <= longest_json, origin, ": at most ", longest_json, " bytes are allowed, came ", text.size());
  // The JSON parser takes a zero byte for the end of its input.
  require(text.find('\0') == text.npos, origin, ": not valid JSON: it holds a zero byte");
  const std::string spelled = spell_infinities(text);
  JsonCheck check(origin, std::is_same_v<Json, nlohmann::json> ? 0 : most_ordered_keys);
  Json::sax_parse(spelled, &check);
  Json object = Json::parse(spelled);
  require(object.is_object(), origin, ": wanted a JSON object, came ", object.type_name());
  return object;
}

}  // namespace zamba::detail
