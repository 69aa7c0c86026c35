// SPDX-License-Identifier: MIT
// HeaderReader: the header of a safetensors file, read strictly. What may stand in it is at the top of
// <zamba/io/safetensors.hpp>; what does not hold to that is an Error that says where, what was wanted and what came.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/device.hpp>
#include <zamba/dtype.hpp>
#include <zamba/error.hpp>
#include <zamba/io/problems.hpp>

namespace zamba::detail {

inline constexpr std::size_t longest_header = 100'000'000;
inline constexpr std::size_t highest_rank = 32;

/// Called by the JSON parser at every key, value, begin and end. Only the form that safetensors.hpp draws is let
/// through, so nesting is bounded, and every key is seen, which a parsed object would not show: it keeps one of equal
/// keys.
class HeaderReader {
 public:
  using json = nlohmann::json;

  struct Entry {
    std::string name;
    DType dtype = DType::F32;
    std::vector<std::uint64_t> shape, offsets;
  };

  explicit HeaderReader(const std::string& origin) : origin_(origin) {}

  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

  /// depth: of the arrays and objects around what was met. False drops it from the parser's result, which is not used.
  bool operator()(int depth, json::parse_event_t event, json& met) {
    depth_ = depth;
    switch (event) {
      case json::parse_event_t::key:
        take_key(met.get_ref<std::string&>());
        break;
      case json::parse_event_t::value:
        take_value(met);
        break;
      case json::parse_event_t::object_start:
        begin_object();
        break;
      case json::parse_event_t::array_start:
        if (depth != 2 || (field_ != shape && field_ != offsets)) refuse("an array");
        break;
      case json::parse_event_t::object_end:
        end_object();
        return false;
      case json::parse_event_t::array_end:
        break;
    }
    return true;
  }

 private:
  enum Field : unsigned { none = 0, dtype = 1, shape = 2, offsets = 4 };

  void begin_object() {
    if (depth_ > 1) refuse("an object");
    if (depth_ == 0) return;
    in_metadata_ = name_ == "__metadata__";
    seen_ = none;
    if (!in_metadata_) {
      entries.emplace_back().name = name_;
    } else if (std::exchange(metadata_seen_, true)) {
      complain("occurs twice");
    }
  }

  void end_object() {
    if (depth_ == 1 && !in_metadata_ && seen_ != (dtype | shape | offsets))
      complain("must have dtype, shape and data_offsets");
    in_metadata_ = false;
    field_ = none;
  }

  void take_key(std::string& text) {
    (depth_ == 1 ? name_ : key_) = std::move(text);
    if (depth_ == 1) return;
    if (in_metadata_) {
      if (metadata.count(key_)) complain("occurs twice");
      return;
    }
    field_ = key_ == "dtype" ? dtype : key_ == "shape" ? shape : key_ == "data_offsets" ? offsets : none;
    if (field_ == none) complain("is unknown, wanted dtype, shape and data_offsets");
    if (seen_ & field_) complain("occurs twice");
    seen_ |= field_;
  }

  void take_value(json& value) {
    if (depth_ == 3 && value.is_number_unsigned()) {
      auto& read = field_ == shape ? entries.back().shape : entries.back().offsets;
      if (read.size() == (field_ == shape ? highest_rank : 2)) refuse("more");
      read.push_back(value.get_ref<const json::number_unsigned_t&>());
    } else if (depth_ == 2 && in_metadata_ && value.is_string()) {
      metadata[key_] = std::move(value.get_ref<std::string&>());
    } else if (depth_ == 2 && field_ == dtype && value.is_string()) {
      const auto& text = value.get_ref<const std::string&>();
      const auto* found = std::begin(dtypes);
      while (found != std::end(dtypes) && found->name != text) ++found;
      if (found == std::end(dtypes)) refuse(quote(text));
      entries.back().dtype = static_cast<DType>(found - std::begin(dtypes));
    } else {
      refuse(value.is_number_float()      ? "a fraction, or an integer beyond 64 bits"
             : value.is_number_unsigned() ? std::to_string(value.get_ref<json::number_unsigned_t&>())
             : value.is_number_integer()  ? std::to_string(value.get_ref<json::number_integer_t&>())
                                          : "a " + std::string(value.type_name()));
    }
  }

  /// Says what is wrong with the key or the value that was met.
  [[noreturn]] void complain(const std::string& problem) const {
    std::string where = depth_ == 0 ? "the header" : name_ == "__metadata__" ? name_ : "tensor " + quote(name_);
    if (depth_ >= 2) where += ": " + quote(key_);
    fail(origin_, ": ", where, " ", problem);
  }

  [[noreturn]] void refuse(const std::string& came) const {
    const char* wanted = depth_ < 2          ? "an object"
                         : in_metadata_      ? "a string"
                         : field_ == dtype   ? "one of F64, F32, F16, BF16, I64, I32, U32, U16, U8, I8, BOOL"
                         : field_ == offsets ? "an array of two integers, 0 or more"
                                             : "an array of at most 32 integers, 0 or more";
    complain(std::string("must be ") + wanted + ", came " + came);
  }

  const std::string& origin_;
  int depth_ = 0;
  bool in_metadata_ = false, metadata_seen_ = false;
  std::string name_, key_;  // the keys at depths 1 and 2
  Field field_ = none;      // what key_ means, within a tensor
  unsigned seen_ = none;    // fields of the present tensor
};

/// Shape and offsets of an entry against each other and against the size of the data.
inline void check_entry(const HeaderReader::Entry& entry, std::size_t data_size, const std::string& where) {
  constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
  std::uint64_t bytes = size_of(entry.dtype), bound = bytes;
  for (const std::uint64_t extent : entry.shape) {
    // Bounded with zeros left out too: strides must not overflow either.
    require(extent <= largest / bound, where, ": the shape's size in bytes exceeds 2^63 - 1");
    bound *= std::max<std::uint64_t>(extent, 1);
    bytes *= extent;
  }
  require(entry.offsets.size() == 2, where, ": 'data_offsets' must be two integers, came ", entry.offsets.size());
  const std::uint64_t begin = entry.offsets[0], end = entry.offsets[1];
  require(begin <= end, where, ": data_offsets [", begin, ", ", end, "] end before they begin");
  require(end <= data_size, where, ": data_offsets [", begin, ", ", end, "] reach beyond the ", data_size,
          " bytes of data in the file");
  require(end - begin == bytes, where, ": shape and ", name_of(entry.dtype), " want ", bytes, " bytes, data_offsets [",
          begin, ", ", end, "] hold ", end - begin);
}

}  // namespace zamba::detail
