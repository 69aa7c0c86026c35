// SPDX-License-Identifier: MIT
// Safetensors in several files of one folder, the shards, and the index that says which tensor is in which:
//
//   model.safetensors.index.json = {"metadata": {"total_size": BYTES}, "weight_map": {"name": "FILE", ...}}
//
// A folder without an index holds one file, model.safetensors. Where both are there, the index counts.
// Reading is strict: the index and the shards must name the same tensors, each once, and shards are files of the folder
// itself; an Error lists all that does not hold.
// Writing replaces a checkpoint of either kind so that a reader, or a machine that stops at any moment, finds the old
// tensors or the new ones, never some of both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/detail/json_object.hpp>
#include <zamba/detail/problems.hpp>
#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/safetensors.hpp>

namespace zamba {

/// Bytes of the caller's, and what messages call them.
struct NamedBytes {
  std::string name;
  std::span<const std::byte> bytes;
};

/// The tensors of several files, or of one.
class ShardedSafetensors {
 public:
  /// The shards that the folder's index names or, without an index, its model.safetensors.
  static ShardedSafetensors open(const std::filesystem::path& directory);
  /// Reads memory of the caller's, which must outlive the result.
  static ShardedSafetensors parse(std::span<const NamedBytes> files);

  const std::set<std::string>& names() const { return names_; }
  /// Null where there is none of that name.
  const TensorEntry* find(std::string_view name) const {
    for (const Safetensors& file : files_)
      if (const TensorEntry* found = file.find(name)) return found;
    return nullptr;
  }
  /// MappedFile::release for bytes of tensors.
  void release(std::span<const std::byte> bytes) const {
    for (const Safetensors& file : files_) file.release(bytes);
  }

 private:
  void add(Safetensors file, detail::Problems& problems);

  std::vector<Safetensors> files_;
  std::set<std::string> names_;
};

/// Replaces the tensors of a folder. With max_shard_bytes, each file holds at most so many bytes of tensors, or one
/// larger tensor; where one file is enough, or by default, there is no index. Equal tensors give equal bytes.
void write_sharded_safetensors(const std::filesystem::path& directory, const std::vector<TensorSource>& tensors,
                               const Metadata& metadata = {}, std::uint64_t max_shard_bytes = 0);

namespace detail {

inline constexpr const char* whole_file = "model.safetensors";
inline constexpr const char* index_file = "model.safetensors.index.json";

/// A name of a file that can only be in the folder itself.
inline bool is_plain_file_name(std::string_view name) {
  const auto outside = [](unsigned char c) { return c == '/' || c == '\\' || c < 0x20 || c == 0x7f; };
  return name.ends_with(".safetensors") && std::none_of(name.begin(), name.end(), outside);
}

/// File by tensor, from the text of an index.
inline std::map<std::string, std::string> parse_index(std::string_view text, const std::string& origin) {
  const nlohmann::json index = parse_object(text, origin);
  const auto weight_map = index.find("weight_map"), metadata = index.find("metadata");
  require(weight_map != index.end() && weight_map->is_object(), origin, ": weight_map must be an object, came ",
          weight_map == index.end() ? "none" : weight_map->type_name());
  require(!weight_map->empty(), origin, ": weight_map names no tensor");
  if (metadata != index.end()) {
    require(metadata->is_object(), origin, ": metadata must be an object, came ", metadata->type_name());
    const auto size = metadata->find("total_size");
    require(size == metadata->end() || size->is_number(), origin, ": total_size must be a number, came ",
            size == metadata->end() ? "none" : value_text(*size));
  }
  std::map<std::string, std::string> files;
  Problems problems;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string() || !is_plain_file_name(file.get_ref<const std::string&>()))
      problems.add(quote(tensor) + ": wanted the name of a .safetensors file in this folder, came " +
                   quote(file.is_string() ? file.get<std::string>() : value_text(file)));
    else
      files.emplace(tensor, file.get<std::string>());
  }
  problems.check(origin + ": weight_map is wrong:");
  return files;
}

inline std::map<std::string, std::string> read_index(const std::filesystem::path& path) {
  const MappedFile file(path);
  return parse_index({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, path.string());
}

/// "model-00001-of-00003.safetensors".
inline std::string shard_name(std::size_t i, std::size_t count) {
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, count);
  return name;
}

inline bool is_shard_name(std::string_view name) {
  constexpr std::string_view form = "model-#####-of-#####.safetensors";
  return std::equal(name.begin(), name.end(), form.begin(), form.end(),
                    [](char c, char wanted) { return wanted == '#' ? c >= '0' && c <= '9' : c == wanted; });
}

inline constexpr std::string_view previous = "previous-";

/// The tensors of each file: consecutive ones, filled up to the limit.
inline std::vector<std::vector<TensorSource>> split_into_shards(const std::vector<TensorSource>& tensors,
                                                                std::uint64_t max_shard_bytes) {
  std::vector<std::vector<TensorSource>> shards(1);
  std::uint64_t bytes = 0;
  for (const TensorSource& tensor : tensors) {
    const std::uint64_t size = bytes_of(tensor);
    if (max_shard_bytes > 0 && !shards.back().empty() && (bytes > max_shard_bytes || size > max_shard_bytes - bytes)) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().push_back(tensor);
    bytes += size;
  }
  return shards;
}

inline std::string index_text(const std::map<std::string, std::string>& files, std::uint64_t total_bytes) {
  nlohmann::json index;
  index["metadata"]["total_size"] = total_bytes;
  index["weight_map"] = files;
  return index.dump(2) + "\n";
}

inline void write_index(const std::filesystem::path& directory, const std::string& text) {
  replace_file(directory / index_file, [&](FileWriter& out) { out.write(text); });
}

/// Gives the shards of the folder's index whose names new ones will take a second name, and the index with it.
inline void set_aside(const std::filesystem::path& directory, const std::set<std::string>& taken) {
  std::map<std::string, std::string> files;
  try {
    files = read_index(directory / index_file);
  } catch (const Error&) {
    return;  // none, or none that could be loaded
  }
  std::set<std::string> renamed;
  for (auto& [tensor, file] : files) {
    if (!taken.contains(file)) continue;
    const std::string other = std::string(previous) + file;
    if (renamed.insert(file).second) {
      std::error_code error;
      remove_file(directory / other);
      std::filesystem::create_hard_link(directory / file, directory / other, error);
      if (error && std::filesystem::exists(directory / file, error)) {  // not every file system has links
        const MappedFile old(directory / file);
        replace_file(directory / other, [&](FileWriter& out) { out.write(old.bytes()); });
      }
    }
    file = other;
  }
  if (!renamed.empty()) write_index(directory, index_text(files, 0));
}

/// Removes the files of an earlier checkpoint that the present one does not name.
inline void remove_stale(const std::filesystem::path& directory, const std::set<std::string>& present) {
  std::vector<std::filesystem::path> stale;
  for (const auto& file : std::filesystem::directory_iterator(directory)) {
    const std::string name = file.path().filename().string();
    const bool ours = name == whole_file || is_shard_name(name) ||
                      (name.starts_with(previous) && is_shard_name(name.substr(previous.size())));
    if (ours && !present.contains(name)) stale.push_back(file.path());
  }
  for (const auto& path : stale) remove_file(path);
}

}  // namespace detail

inline void ShardedSafetensors::add(Safetensors file, detail::Problems& problems) {
  for (const TensorEntry& tensor : file.tensors())
    if (!names_.insert(tensor.name).second)
      problems.add(file.origin() + ": tensor " + detail::quote(tensor.name) +
                   " is in another file of this checkpoint too");
  files_.push_back(std::move(file));
}

inline ShardedSafetensors ShardedSafetensors::parse(std::span<const NamedBytes> files) {
  ShardedSafetensors result;
  detail::Problems problems;
  for (const NamedBytes& file : files) result.add(Safetensors::parse(file.bytes, file.name), problems);
  problems.check("the files do not belong together:");
  return result;
}

inline ShardedSafetensors ShardedSafetensors::open(const std::filesystem::path& directory) {
  ShardedSafetensors result;
  detail::Problems problems;
  const auto index = directory / detail::index_file;
  std::error_code error;
  if (!std::filesystem::exists(index, error)) {
    result.add(Safetensors::open(directory / detail::whole_file), problems);
    return result;
  }
  const auto files = detail::read_index(index);
  std::set<std::string> shards;
  for (const auto& [tensor, file] : files)
    if (shards.insert(file).second && !std::filesystem::exists(directory / file, error))
      problems.add("shard " + detail::quote(file) + " is missing");
  problems.check(index.string() + " and its folder do not fit:");
  for (const std::string& shard : shards) result.add(Safetensors::open(directory / shard), problems);

  auto file = result.files_.begin();
  for (const std::string& shard : shards) {
    for (const TensorEntry& tensor : file->tensors()) {
      const auto at = files.find(tensor.name);
      if (at == files.end() || at->second != shard)
        problems.add("shard " + detail::quote(shard) + " holds " + detail::quote(tensor.name) + ", which the index " +
                     (at == files.end() ? "lacks" : "has in " + detail::quote(at->second)));
    }
    ++file;
  }
  for (const auto& [tensor, shard] : files)
    if (!result.names_.contains(tensor))
      problems.add(detail::quote(tensor) + " is not in its shard " + detail::quote(shard));
  problems.check(index.string() + " and its shards do not fit:");
  return result;
}

// The order of writing. One file: it, then the index goes. Shards: they, under names that no index of the folder has,
// then the index at once. An old index whose shards have the new ones' names first gets them under others. What is
// left of the old checkpoint goes last.
inline void write_sharded_safetensors(const std::filesystem::path& directory, const std::vector<TensorSource>& tensors,
                                      const Metadata& metadata, std::uint64_t max_shard_bytes) {
  const auto shards = detail::split_into_shards(tensors, max_shard_bytes);
  if (shards.size() == 1) {
    write_safetensors(directory / detail::whole_file, tensors, metadata);
    remove_file(directory / detail::index_file);
    return detail::remove_stale(directory, {detail::whole_file});
  }
  std::map<std::string, std::string> files;
  std::set<std::string> names;
  std::uint64_t total_bytes = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    names.insert(detail::shard_name(i, shards.size()));
    for (const TensorSource& tensor : shards[i]) {
      require(files.emplace(tensor.name, detail::shard_name(i, shards.size())).second,
              "safetensors: two tensors are named ", detail::quote(tensor.name));
      total_bytes += detail::bytes_of(tensor);
    }
  }
  detail::set_aside(directory, names);
  for (std::size_t i = 0; i < shards.size(); ++i)
    write_safetensors(directory / detail::shard_name(i, shards.size()), shards[i], metadata);
  detail::write_index(directory, detail::index_text(files, total_bytes));
  detail::remove_stale(directory, names);
}

}  // namespace zamba
