// SPDX-License-Identifier: MIT
// Safetensors: named tensors in a file, read in place and written.
//
//   file = N (8 bytes, little-endian) | header (N bytes of JSON, may end in spaces) | data
//   header = {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}}
//
// The tensors cover the data without gap or overlap; offsets count from its beginning (github.com/huggingface/
// safetensors, "Format"). Reading is strict: what does not hold to this is an Error that names the file, the tensor,
// what was wanted and what came. No byte outside the span is read, and tensors may start at any address.
// Numbers: conversions round to nearest, ties to even, once; equal types are copied bit by bit.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/device.hpp>
#include <zamba/dtype.hpp>
#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/safetensors/header.hpp>
#include <zamba/number.hpp>

namespace zamba {

/// One tensor of a file. The bytes belong to the file and may start at any address.
struct TensorEntry {
  std::string name;
  DType dtype = DType::F32;
  std::vector<Index> shape;  // outermost first; empty for a scalar
  std::span<const std::byte> bytes;

  Index count() const { return static_cast<Index>(bytes.size() / size_of(dtype)); }
};

using Metadata = std::map<std::string, std::string>;

/// The tensors of one file.
class Safetensors {
 public:
  /// Maps the file: bytes are read when they are first touched.
  static Safetensors open(const std::filesystem::path& path);
  /// Reads memory of the caller's, which must outlive the result. `origin` names it in messages.
  static Safetensors parse(std::span<const std::byte> bytes, std::string origin);
  static Safetensors parse(MappedFile file, std::string origin);

  /// In the order of the data.
  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  /// Null where there is none of that name.
  const TensorEntry* find(std::string_view name) const;
  const Metadata& metadata() const { return metadata_; }
  /// The path, or what parse() was told.
  const std::string& origin() const { return origin_; }
  /// MappedFile::release for bytes of tensors; does nothing for memory of the caller's.
  void release(std::span<const std::byte> bytes) const { file_.release(bytes); }
  /// MappedFile::is_at; false for memory of the caller's.
  bool is_at(const std::filesystem::path& path) const { return file_.is_at(path); }

 private:
  MappedFile file_;
  std::string origin_;
  std::vector<TensorEntry> tensors_;
  std::vector<std::size_t> by_name_;  // positions in tensors_, sorted by name
  Metadata metadata_;
};

/// Writes elements [first, first + count) to `to`. Floating-point tensors become double, float or bf16; integer tensors
/// (BOOL counts as 0 and 1) any integer type that holds the values. Anything else is an Error.
template <class T>
void read_values(const TensorEntry& entry, Index first, Index count, T* to);

/// All elements.
template <class T>
std::vector<T> read_values(const TensorEntry& entry) {
  std::vector<T> values(static_cast<std::size_t>(entry.count()));
  read_values(entry, 0, entry.count(), values.data());
  return values;
}

/// A tensor to be written. `bytes` is called once, in the order of the file; what it returns must stay valid until the
/// next tensor's is called, so one buffer may serve all.
struct TensorSource {
  std::string name;
  DType dtype = DType::F32;
  std::vector<Index> shape;
  std::function<std::span<const std::byte>()> bytes;
};

/// Replaces the file (see replace_file). The tensors keep the given order if that aligns each to its element, as it
/// always does where elements are of one size; otherwise those of larger elements come first.
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorSource>& tensors,
                       const Metadata& metadata = {});

/// The same bytes, in memory.
std::vector<std::byte> serialize_safetensors(const std::vector<TensorSource>& tensors, const Metadata& metadata = {});

// ---- Reading ----

inline Safetensors Safetensors::open(const std::filesystem::path& path) {
  return parse(MappedFile(path), path.string());
}

inline Safetensors Safetensors::parse(MappedFile file, std::string origin) {
  Safetensors result = parse(file.bytes(), std::move(origin));
  result.file_ = std::move(file);
  return result;
}

inline Safetensors Safetensors::parse(std::span<const std::byte> bytes, std::string origin) {
  Safetensors result;
  result.origin_ = std::move(origin);
  const std::string& in = result.origin_;
  std::uint64_t length = 0;
  require(bytes.size() >= sizeof(length), in, ": a safetensors file has at least 8 bytes, came ", bytes.size());
  std::memcpy(&length, bytes.data(), sizeof(length));
  bytes = bytes.subspan(sizeof(length));
  require(length <= detail::longest_header, in, ": the header may have ", detail::longest_header,
          " bytes, its length field says ", length, " (not a safetensors file?)");
  require(length <= bytes.size(), in, ": the header's length field says ", length, " bytes, the file has ",
          bytes.size(), " after it");
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()), length);
  const auto data = bytes.subspan(length);

  require(header.starts_with('{'), in, ": the header must be a JSON object and begin with '{'");
  // The JSON parser takes a zero byte for the end of its input.
  require(header.find('\0') == header.npos, in, ": the header is not valid JSON: it holds a zero byte");
  detail::HeaderReader reader(in);
  try {
    [[maybe_unused]] const auto emptied = nlohmann::json::parse(header, std::ref(reader));
  } catch (const nlohmann::json::exception& error) {
    fail(in, ": the header is not valid JSON: ", detail::quote(error.what()));
  }

  auto& entries = reader.entries;
  for (const auto& entry : entries)
    detail::check_entry(entry, data.size(), in + ": tensor " + detail::quote(entry.name));
  // An empty tensor comes before the one that begins at the same place.
  std::stable_sort(entries.begin(), entries.end(), [](auto& a, auto& b) { return a.offsets < b.offsets; });
  std::uint64_t covered = 0;
  for (auto& [name, dtype, shape, offsets] : entries) {
    require(offsets[0] == covered, in, ": tensor ", detail::quote(name), " begins at byte ", offsets[0],
            " of the data, wanted ", covered, ": it ", offsets[0] < covered ? "overlaps" : "leaves a gap to",
            " the tensor before it");
    result.tensors_.push_back({std::move(name), dtype, std::vector<Index>(shape.begin(), shape.end()),
                               data.subspan(offsets[0], offsets[1] - offsets[0])});
    covered = offsets[1];
  }
  require(covered == data.size(), in, ": the tensors end at byte ", covered, " of the data, the file has ", data.size(),
          " bytes of data");

  auto& by_name = result.by_name_;
  const auto name = [&](std::size_t i) -> const std::string& { return result.tensors_[i].name; };
  for (std::size_t i = 0; i < result.tensors_.size(); ++i) by_name.push_back(i);
  std::sort(by_name.begin(), by_name.end(), [&](std::size_t a, std::size_t b) { return name(a) < name(b); });
  for (std::size_t i = 1; i < by_name.size(); ++i) {
    require(name(by_name[i - 1]) != name(by_name[i]), in, ": tensor ", detail::quote(name(by_name[i])),
            " occurs twice");
  }
  result.metadata_ = std::move(reader.metadata);
  return result;
}

inline const TensorEntry* Safetensors::find(std::string_view name) const {
  const auto at = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                   [&](std::size_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
  return at != by_name_.end() && tensors_[*at].name == name ? &tensors_[*at] : nullptr;
}

// ---- Values ----

namespace detail {

/// One floating-point value as another type, rounded once.
template <class To, class From>
To convert_value(From value) {
  if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, double>) {
    // Through float with its last bit set where that is inexact ("round to odd"), so that the second rounding, to
    // bfloat16, sees on which side of a tie the double was.
    const auto nearest = static_cast<float>(value);
    auto bits = std::bit_cast<std::uint32_t>(nearest);
    const double back = static_cast<double>(nearest);
    if (back != value && value == value) {
      if ((back > value) == (value > 0)) --bits;  // towards zero
      bits |= 1;
    }
    return bf16(std::bit_cast<float>(bits));
  } else if constexpr (std::is_same_v<From, f16> || std::is_same_v<From, bf16>) {
    return static_cast<To>(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

template <class T>
inline constexpr bool is_floating = std::is_floating_point_v<T> || std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

/// Calls f(From()) with the type in which elements are read: that of the file, but std::uint8_t for BOOL.
template <class F>
void visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::F64:
      return f(double());
    case DType::F32:
      return f(float());
    case DType::F16:
      return f(f16());
    case DType::BF16:
      return f(bf16());
    case DType::I64:
      return f(std::int64_t());
    case DType::I32:
      return f(std::int32_t());
    case DType::U32:
      return f(std::uint32_t());
    case DType::U16:
      return f(std::uint16_t());
    case DType::I8:
      return f(std::int8_t());
    case DType::U8:
    case DType::BOOL:
      return f(std::uint8_t());
  }
}

}  // namespace detail

template <class T>
void read_values(const TensorEntry& entry, Index first, Index count, T* to) {
  static_assert((detail::is_floating<T> || std::is_integral_v<T>)&&!std::is_same_v<T, bool> && !std::is_same_v<T, f16>,
                "zamba::read_values gives double, float, bf16 or integers");
  if (first < 0 || count < 0 || first > entry.count() || count > entry.count() - first) {
    fail("tensor ", detail::quote(entry.name), " has ", entry.count(), " elements, wanted ", count, " from ", first);
  }
  if (count == 0) return;
  const std::byte* from = entry.bytes.data() + first * static_cast<Index>(size_of(entry.dtype));
  if (entry.dtype == dtype_of<T>()) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
    return;
  }
  detail::visit_dtype(entry.dtype, [&]<class From>(From value) {
    if constexpr (detail::is_floating<From> != detail::is_floating<T>) {
      fail("tensor ", detail::quote(entry.name), " holds ", name_of(entry.dtype), ", wanted ",
           detail::is_floating<T> ? "floating point" : "integers");
    } else {
      for (Index i = 0; i < count; ++i) {
        std::memcpy(&value, from + i * static_cast<Index>(sizeof(From)), sizeof(From));
        if constexpr (detail::is_floating<T>) {
          to[i] = detail::convert_value<T>(value);
        } else {
          if (entry.dtype == DType::BOOL) value = value != 0;
          if (!std::in_range<T>(value)) [[unlikely]] {
            fail("tensor ", detail::quote(entry.name), ": element ", first + i, " is ", +value, ", wanted ",
                 +std::numeric_limits<T>::min(), " to ", +std::numeric_limits<T>::max());
          }
          to[i] = static_cast<T>(value);
        }
      }
    }
  });
}

// ---- Writing ----

namespace detail {

/// Text as a JSON string, quotes included.
inline std::string json_text(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    fail("safetensors: names and metadata must be UTF-8, came ", quote(text));
  }
}

/// Bytes of a tensor of this shape.
inline std::uint64_t bytes_of(const TensorSource& tensor) {
  constexpr std::uint64_t largest = std::numeric_limits<Index>::max();
  std::uint64_t bytes = size_of(tensor.dtype);
  for (const Index extent : tensor.shape) {
    require(extent >= 0 && (extent == 0 || bytes <= largest / static_cast<std::uint64_t>(extent)),
            "safetensors: tensor ", quote(tensor.name), " has an impossible extent, ", extent);
    bytes *= static_cast<std::uint64_t>(extent);
  }
  return bytes;
}

/// The length field and the header, padded to a multiple of 8 bytes. `tensors` are in the order of the data.
inline std::string safetensors_header(const std::vector<const TensorSource*>& tensors, const Metadata& metadata) {
  std::vector<std::string_view> names{"__metadata__"};
  std::string header = "{";
  const auto separate = [&] { header += header.size() > 1 ? "," : ""; };
  if (!metadata.empty()) {
    std::string texts;
    for (const auto& [key, text] : metadata)
      texts += (texts.empty() ? "" : ",") + json_text(key) + ":" + json_text(text);
    header += "\"__metadata__\":{" + texts + "}";
  }
  std::uint64_t begin = 0;
  for (const TensorSource* tensor : tensors) {
    const std::uint64_t end = begin + bytes_of(*tensor);
    separate();
    header += json_text(tensor->name) + ":{\"dtype\":\"" + std::string(name_of(tensor->dtype)) + "\",\"shape\":[";
    for (std::size_t i = 0; i < tensor->shape.size(); ++i)
      header.append(i ? "," : "").append(std::to_string(tensor->shape[i]));
    header += "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
    names.push_back(tensor->name);
    begin = end;
  }
  header += "}";
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  require(twice == names.end(), "safetensors: two tensors are named ", quote(twice == names.end() ? "" : *twice));
  header.resize(ceil_div(header.size(), std::size_t{8}) * 8, ' ');
  require(header.size() <= longest_header, "safetensors: the header would have ", header.size(), " bytes, at most ",
          longest_header, " are allowed");
  const std::uint64_t length = header.size();
  std::string field(sizeof(length), '\0');
  std::memcpy(field.data(), &length, sizeof(length));
  return field + header;
}

/// Calls sink(span of bytes) with the parts of the file, one after the other.
template <class Sink>
void emit_safetensors(const std::vector<TensorSource>& tensors, const Metadata& metadata, Sink&& sink) {
  std::vector<const TensorSource*> order;
  std::uint64_t offset = 0;
  bool aligned = true;
  for (const auto& tensor : tensors) {
    order.push_back(&tensor);
    aligned = aligned && offset % size_of(tensor.dtype) == 0;
    offset += bytes_of(tensor);
  }
  const auto larger = [](auto* a, auto* b) { return size_of(a->dtype) > size_of(b->dtype); };
  if (!aligned) std::stable_sort(order.begin(), order.end(), larger);
  const std::string header = safetensors_header(order, metadata);
  sink(std::as_bytes(std::span(header)));
  for (const TensorSource* tensor : order) {
    const auto bytes = tensor->bytes();
    require(bytes.size() == bytes_of(*tensor), "safetensors: tensor ", quote(tensor->name), " wants ",
            bytes_of(*tensor), " bytes, came ", bytes.size());
    sink(bytes);
  }
}

}  // namespace detail

inline void write_safetensors(const std::filesystem::path& path, const std::vector<TensorSource>& tensors,
                              const Metadata& metadata) {
  replace_file(path, [&](FileWriter& out) {
    detail::emit_safetensors(tensors, metadata, [&](std::span<const std::byte> bytes) { out.write(bytes); });
  });
}

inline std::vector<std::byte> serialize_safetensors(const std::vector<TensorSource>& tensors,
                                                    const Metadata& metadata) {
  std::vector<std::byte> file;
  detail::emit_safetensors(tensors, metadata, [&](std::span<const std::byte> bytes) {
    file.insert(file.end(), bytes.begin(), bytes.end());
  });
  return file;
}

}  // namespace zamba
