// SPDX-License-Identifier: MIT
// JsonPart: a value of a JSON file together with its place in it, so that what is refused says where it stands:
// "tokenizer.json: model: vocab: 'a': wanted an integer of 0 to 1048575, came -1".
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include <zamba/device.hpp>
#include <zamba/error.hpp>

namespace zamba::detail {

/// A view: the JSON value must outlive it.
class JsonPart {
 public:
  using json = nlohmann::json;

  JsonPart(const json& value, std::string place) : value_(&value), place_(std::move(place)) {}

  /// The value under a key; null where there is none.
  JsonPart operator[](const char* key) const {
    static const json none;
    constexpr std::size_t longest = 120;  // of the key, in messages
    std::string place = place_ + ": ";
    place += std::string_view(key).substr(0, longest);
    if (is_null()) return {none, std::move(place)};
    const auto at = object().find(key);
    return {at == value_->end() ? none : *at, std::move(place)};
  }

  bool is_null() const { return value_->is_null(); }
  bool is_text() const { return value_->is_string(); }

  const std::string& text() const {
    if (!value_->is_string()) refuse("a string");
    return value_->get_ref<const std::string&>();
  }

  /// `absent` where there is no value, or null.
  std::string text_or(std::string_view absent) const { return is_null() ? std::string(absent) : text(); }

  bool flag(bool absent) const {
    if (is_null()) return absent;
    if (!value_->is_boolean()) refuse("true or false");
    return value_->get<bool>();
  }

  /// An integer of 0 to `largest`.
  Index integer(Index largest) const {
    const bool fits =
        largest >= 0 && value_->is_number_unsigned() &&
        value_->get_ref<const json::number_unsigned_t&>() <= static_cast<json::number_unsigned_t>(largest);
    if (!fits) refuse("an integer of 0 to " + std::to_string(largest));
    return value_->get<Index>();
  }

  const json& object() const {
    if (!value_->is_object()) refuse("an object");
    return *value_;
  }

  /// Calls f(JsonPart) with each element of an array; null counts as an empty one.
  template <class F>
  void each(F&& f) const {
    if (is_null()) return;
    if (!value_->is_array()) refuse("an array");
    for (std::size_t i = 0; i < value_->size(); ++i) f(JsonPart((*value_)[i], place_ + "[" + std::to_string(i) + "]"));
  }

  std::size_t size() const { return value_->size(); }
  const json& value() const { return *value_; }
  const std::string& place() const { return place_; }

  /// Throws: here, `wanted` was wanted, and what the file has came.
  [[noreturn]] void refuse(const std::string& wanted) const {
    constexpr std::size_t longest = 60;
    std::string came = value_->is_structured() ? "an " + std::string(value_->type_name())
                                               : value_->dump(-1, ' ', false, json::error_handler_t::replace);
    if (came.size() > longest) came = came.substr(0, longest) + "...";
    fail(place_, ": wanted ", wanted, ", came ", value_->is_null() ? "none" : came);
  }

 private:
  const json* value_;
  std::string place_;
};

}  // namespace zamba::detail
