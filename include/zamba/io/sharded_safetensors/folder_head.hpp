// SPDX-License-Identifier: MIT
// The files of a checkpoint's folder: their names, and which of them count at a moment.
//
//   model.safetensors.index.json               which tensor is in which shard; decides where it is there
//   model.safetensors                          all tensors in one file; decides without an index
//   model-<hash>-00001-of-00003.safetensors    a shard, named after what all shards of a save hold
//   config.json.next-<hash>                    a text of the save that counts, on its way into its place
//
// What decides, the head of the folder, holds the hashes of the texts that were saved with it, in its metadata.
// A shard is never overwritten by another one, so a reader that has the head finds its shards and texts or none at all.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/io/safetensors.hpp>

namespace zamba::detail {

inline constexpr const char* whole_file = "model.safetensors";
inline constexpr const char* index_file = "model.safetensors.index.json";

/// 64 bits that tell contents apart; no defence against somebody who looks for two that they do not. Four lanes of
/// words, so that it keeps up with memory.
inline std::uint64_t content_hash(std::span<const std::byte> bytes, std::uint64_t before = 0) {
  // A product carries bits upwards only, so the upper half is brought down, and they go up once more.
  const auto mix = [](std::uint64_t hash, std::uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    return (hash ^ hash >> 32) * 0xd6e8feb86659fd93;
  };
  std::uint64_t a = before + 1, b = before + 2, c = before + 3, d = before + 4;
  std::array<std::uint64_t, 4> words{};
  const std::size_t size = bytes.size(), rest = size % sizeof words;
  const std::byte* const end = bytes.data() + (size - rest);
  const auto take = [&](const std::byte* from, std::size_t count) {
    if (count > 0) std::memcpy(words.data(), from, count);
    a = mix(a, words[0]), b = mix(b, words[1]), c = mix(c, words[2]), d = mix(d, words[3]);
  };
  for (const std::byte* at = bytes.data(); at != end; at += sizeof words) take(at, sizeof words);
  words.fill(0);
  take(end, rest);
  const std::uint64_t hash = mix(mix(mix(mix(size, a), b), c), d);
  return hash ^ hash >> 32;
}

/// Sixteen digits.
inline std::string hash_text(std::uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}
inline std::string hash_of(std::string_view text) { return hash_text(content_hash(std::as_bytes(std::span(text)))); }

/// Whether a text is of the form, in which '#' stands for a digit, '*' for one of a hash, and all else for itself.
inline bool has_form(std::string_view text, std::string_view form) {
  return std::equal(text.begin(), text.end(), form.begin(), form.end(), [](char c, char wanted) {
    const bool digit = c >= '0' && c <= '9';
    return wanted == '#' ? digit : wanted == '*' ? digit || (c >= 'a' && c <= 'f') : c == wanted;
  });
}

/// A name of a file that can only be in the folder itself.
inline bool is_plain_file_name(std::string_view name) {
  const auto outside = [](unsigned char c) { return c == '/' || c == '\\' || c < 0x20 || c == 0x7f; };
  return !name.empty() && name != "." && name != ".." && std::none_of(name.begin(), name.end(), outside);
}

/// "model-<hash>-00001-of-00003.safetensors".
inline std::string shard_name(const std::string& hash, std::size_t i, std::size_t count) {
  char place[64];
  std::snprintf(place, sizeof place, "-%05zu-of-%05zu.safetensors", i + 1, count);
  return "model-" + hash + place;
}
inline bool is_shard_name(std::string_view name) {
  return has_form(name, "model-****************-#####-of-#####.safetensors");
}
/// As other programs name theirs.
inline bool is_plain_shard_name(std::string_view name) { return has_form(name, "model-#####-of-#####.safetensors"); }

/// "config.json.next-<hash>".
inline std::string next_name(const std::string& text, const std::string& hash) { return text + ".next-" + hash; }
inline bool is_next_name(std::string_view name) {
  constexpr std::string_view form = ".next-****************";
  return name.size() > form.size() && has_form(name.substr(name.size() - form.size()), form);
}

/// File by tensor, from an index.
inline std::map<std::string, std::string> weight_map_of(const nlohmann::json& index, const std::string& origin) {
  const auto weight_map = index.find("weight_map");
  require(weight_map != index.end() && weight_map->is_object(), origin, ": weight_map must be an object, came ",
          weight_map == index.end() ? "none" : weight_map->type_name());
  require(!weight_map->empty(), origin, ": weight_map names no tensor");
  std::map<std::string, std::string> files;
  Problems problems;
  for (const auto& [tensor, file] : weight_map->items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : std::string();
    if (!name.ends_with(".safetensors") || !is_plain_file_name(name))
      problems.add(quote(tensor) + ": wanted the name of a .safetensors file in this folder, came " +
                   quote(file.is_string() ? name : value_text(file)));
    else
      files.emplace(tensor, name);
  }
  problems.check(origin + ": weight_map is wrong:");
  return files;
}

/// The texts of an index's metadata.
inline Metadata metadata_of(const nlohmann::json& index, const std::string& origin) {
  const auto metadata = index.find("metadata");
  if (metadata == index.end()) return {};
  require(metadata->is_object(), origin, ": metadata must be an object, came ", metadata->type_name());
  const auto size = metadata->find("total_size");
  require(size == metadata->end() || size->is_number(), origin, ": total_size must be a number, came ",
          size == metadata->end() ? "none" : value_text(*size));
  Metadata texts;
  for (const auto& [key, value] : metadata->items())
    if (value.is_string()) texts.emplace(key, value.get<std::string>());
  return texts;
}

/// What decides which tensors a folder holds, and which texts belong to them.
class FolderHead {
 public:
  /// Nothing where the folder has neither an index nor a whole file.
  static std::optional<FolderHead> open(const std::filesystem::path& directory) {
    FolderHead head;
    head.path_ = directory / index_file;
    head.index_ = MappedFile::open_if_there(head.path_);
    if (head.index_) {
      const nlohmann::json index = parse_object(head.index_->text(), head.path_.string());
      head.weight_map = weight_map_of(index, head.path_.string());
      head.metadata = metadata_of(index, head.path_.string());
      return head;
    }
    head.path_ = directory / whole_file;
    std::optional<MappedFile> file = MappedFile::open_if_there(head.path_);
    if (!file) return {};
    head.whole = Safetensors::parse(std::move(*file), head.path_.string());
    head.metadata = head.whole->metadata();
    return head;
  }

  bool has_index() const { return index_.has_value(); }
  std::string origin() const { return path_.string(); }

  /// Whether the folder still has this head.
  bool is_current() const {
    if (index_) return index_->is_at(path_);
    // In this order: who takes an index away again has replaced the whole file before.
    return !is_there(path_.parent_path() / index_file) && whole->is_at(path_);
  }

  /// The shards.
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& [tensor, file] : weight_map) names.insert(file);
    return names;
  }

  /// The hashes of the texts that were saved with it.
  std::map<std::string, std::string> texts() const {
    std::map<std::string, std::string> hashes;
    for (const auto& [name, hash] : metadata)
      if (is_plain_file_name(name) && has_form(hash, "****************")) hashes.emplace(name, hash);
    return hashes;
  }

  std::map<std::string, std::string> weight_map;  // file by tensor, where there is an index
  std::optional<Safetensors> whole;               // where there is none
  Metadata metadata;

 private:
  std::filesystem::path path_;
  std::optional<MappedFile> index_;
};

}  // namespace zamba::detail
