// SPDX-License-Identifier: MIT
// Safetensors in several files of one folder, the shards, and the index that says which tensor is in which:
//
//   model.safetensors.index.json = {"metadata": {"total_size": BYTES}, "weight_map": {"name": "FILE", ...}}
//
// A folder without an index holds one file, model.safetensors. Where both are there, the index counts.
// Reading is strict: the index and the shards must name the same tensors, each once, and shards are files of the folder
// itself; an Error lists all that does not hold.
// Writing replaces a checkpoint of either kind, and the texts that belong to it, at one moment: that at which the new
// index or the new model.safetensors gets its name, or the old index loses it. Whoever reads with what is below, in
// this process or another, and whenever a writer or the machine stops, gets all of the old or all of the new. A second
// writer waits for the first. What killed writers left is removed by the next one.
// Between machines this holds where their file system has rename() at one moment and locks, as NFS has from version 4
// on; where it has no locks, writers must be kept apart by their user. Programs of others read the same files in their
// own order, so while a writer is at work they may meet an old config.json beside new tensors, or a missing shard;
// never shards of two writers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/folder.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/io/sharded_safetensors/folder_head.hpp>

namespace zamba {

/// Bytes of the caller's, and what messages call them.
struct NamedBytes {
  std::string name;
  std::span<const std::byte> bytes;
};

/// The tensors of several files, or of one. Copies share the files.
class ShardedSafetensors {
 public:
  /// The shards that the folder's index names or, without an index, its model.safetensors; and those of the named texts
  /// that the folder has, as they belong to these tensors.
  static ShardedSafetensors open(const std::filesystem::path& directory, const std::vector<std::string>& texts = {});
  /// Reads memory of the caller's, which must outlive the result.
  static ShardedSafetensors parse(std::span<const NamedBytes> files);

  const std::set<std::string>& names() const { return names_; }
  /// Null where there is none of that name.
  const TensorEntry* find(std::string_view name) const {
    for (const Safetensors& file : *files_)
      if (const TensorEntry* found = file.find(name)) return found;
    return nullptr;
  }
  /// Null where the folder has none of that name, or open() was not told it.
  const std::string* text(const std::string& name) const {
    const auto found = texts_.find(name);
    return found == texts_.end() ? nullptr : &found->second;
  }
  /// MappedFile::release for bytes of tensors.
  void release(std::span<const std::byte> bytes) const {
    for (const Safetensors& file : *files_) file.release(bytes);
  }

 private:
  void add(Safetensors file, detail::Problems& problems);
  void open_shards(const std::filesystem::path& directory, const detail::FolderHead& head);
  bool read_texts(const std::filesystem::path& directory, const detail::FolderHead& head,
                  const std::vector<std::string>& names);

  std::shared_ptr<std::vector<Safetensors>> files_ = std::make_shared<std::vector<Safetensors>>();
  std::set<std::string> names_;
  std::map<std::string, std::string> texts_;
};

/// Replaces the tensors of a folder, and texts that belong to them, as {"config.json", "{}"}; other files stay. With
/// max_shard_bytes, each file holds at most so many bytes of tensors, or one larger tensor; where one file is enough,
/// or by default, there is no index. Equal tensors and texts give equal bytes and names.
void write_sharded_safetensors(const std::filesystem::path& directory, const std::vector<TensorSource>& tensors,
                               const Metadata& metadata = {}, std::uint64_t max_shard_bytes = 0,
                               const std::map<std::string, std::string>& texts = {});

// ---- Reading ----

inline void ShardedSafetensors::add(Safetensors file, detail::Problems& problems) {
  for (const TensorEntry& tensor : file.tensors())
    if (!names_.insert(tensor.name).second)
      problems.add(file.origin() + ": tensor " + detail::quote(tensor.name) +
                   " is in another file of this checkpoint too");
  files_->push_back(std::move(file));
}

inline ShardedSafetensors ShardedSafetensors::parse(std::span<const NamedBytes> files) {
  ShardedSafetensors result;
  detail::Problems problems;
  for (const NamedBytes& file : files) result.add(Safetensors::parse(file.bytes, file.name), problems);
  problems.check("the files do not belong together:");
  return result;
}

/// All shards of an index, which must fit it.
inline void ShardedSafetensors::open_shards(const std::filesystem::path& directory, const detail::FolderHead& head) {
  detail::Problems problems;
  const std::set<std::string> shards = head.files();
  for (const std::string& shard : shards) {
    std::optional<MappedFile> file = MappedFile::open_if_there(directory / shard);
    if (file)
      add(Safetensors::parse(std::move(*file), (directory / shard).string()), problems);
    else
      problems.add("shard " + detail::quote(shard) + " is missing");
  }
  problems.check(head.origin() + " and its folder do not fit:");
  auto file = files_->begin();
  for (const std::string& shard : shards) {
    for (const TensorEntry& tensor : file->tensors()) {
      const auto at = head.weight_map.find(tensor.name);
      if (at == head.weight_map.end() || at->second != shard)
        problems.add("shard " + detail::quote(shard) + " holds " + detail::quote(tensor.name) + ", which the index " +
                     (at == head.weight_map.end() ? "lacks" : "has in " + detail::quote(at->second)));
    }
    ++file;
  }
  for (const auto& [tensor, shard] : head.weight_map)
    if (!names_.contains(tensor)) problems.add(detail::quote(tensor) + " is not in its shard " + detail::quote(shard));
  problems.check(head.origin() + " and its shards do not fit:");
}

/// Whether all of them are surely of this head. One that was edited, or was not saved with it, is too as long as the
/// folder has this head.
inline bool ShardedSafetensors::read_texts(const std::filesystem::path& directory, const detail::FolderHead& head,
                                           const std::vector<std::string>& names) {
  bool sure = true;
  const auto hashes = head.texts();
  for (const std::string& name : names) {
    const auto hash = hashes.find(name);
    std::optional<MappedFile> file;
    // In this order: what is not on its way any more is in its place.
    if (hash != hashes.end()) file = MappedFile::open_if_there(directory / detail::next_name(name, hash->second));
    const bool on_its_way = file.has_value();
    if (!file) file = MappedFile::open_if_there(directory / name);
    if (!file) {
      sure = false;
      continue;
    }
    require(file->text().size() <= detail::longest_json, (directory / name).string(), ": at most ",
            detail::longest_json, " bytes are allowed, came ", file->text().size());
    texts_.emplace(name, file->text());
    sure = sure && (on_its_way || (hash != hashes.end() && detail::hash_of(file->text()) == hash->second));
  }
  return sure;
}

inline ShardedSafetensors ShardedSafetensors::open(const std::filesystem::path& directory,
                                                   const std::vector<std::string>& texts) {
  constexpr int most = 100;  // a writer takes longer than a reader: two attempts are rare
  for (int attempt = 1;; ++attempt) {
    std::optional<detail::FolderHead> head = detail::FolderHead::open(directory);
    if (!head && attempt < most) continue;  // one came while the other went
    if (!head) fail("cannot open '", (directory / detail::whole_file).string(), "': ", detail::errno_text(ENOENT));
    try {
      ShardedSafetensors result;
      if (head->has_index()) result.open_shards(directory, *head);
      if (result.read_texts(directory, *head, texts) || head->is_current()) {
        detail::Problems none;
        if (!head->has_index()) result.add(std::move(*head->whole), none);
        return result;
      }
    } catch (const Error&) {
      if (attempt == most || head->is_current()) throw;
    }
    require(attempt < most, "'", directory.string(), "' was replaced again and again while it was read");
  }
}

// ---- Writing ----

namespace detail {

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

/// One Writer at a time holds a folder.
class CheckpointWriter {
 public:
  using Texts = std::map<std::string, std::string>;

  explicit CheckpointWriter(const std::filesystem::path& directory)
      : directory_(directory), folder_(open_folder(directory)), lock_(folder_.get()) {}

  /// Ends what a killed writer began, and removes what it left.
  void tidy() {
    remove_left_over(directory_, folder_.get(), [](std::string_view stem) {
      return stem == whole_file || stem == index_file || stem == new_shard || is_next_name(stem);
    });
    std::optional<FolderHead> head;
    try {
      head = FolderHead::open(directory_);
    } catch (const Error&) {
      return;  // one that cannot be read: all of it goes when the new one is there
    }
    if (head) put_texts(head->texts());
    files_ = head ? head->files() : std::set<std::string>();
    remove([&](const std::string& name) { return is_shard_name(name) && !files_.contains(name); });
    remove(is_next_name);
  }

  /// Lets texts wait for their tensors, those that the folder does not have already. Returns the hashes of all.
  Texts prepare_texts(const Texts& texts) {
    Texts hashes;
    for (const auto& [name, text] : texts) {
      const std::string hash = hashes.emplace(name, hash_of(text)).first->second;
      const auto present = MappedFile::open_if_there(directory_ / name);
      if (!present || present->text() != text)
        replace_file(directory_ / next_name(name, hash),
                     [&, &whole = text](FileWriter& out) { out.write(std::string_view(whole)); });
    }
    return hashes;
  }

  /// Gives the texts that waited their places.
  void put_texts(const Texts& hashes) {
    for (const auto& [name, hash] : hashes) {
      const auto next = directory_ / next_name(name, hash);
      const auto text = MappedFile::open_if_there(next);
      if (!text) continue;
      replace_file(directory_ / name, [&](FileWriter& out) { out.write(text->text()); });
      remove_file(next);
    }
  }

  /// Whether one file can take the place of what is there: not if it is one of several.
  bool can_be_whole() const { return !files_.contains(whole_file); }

  void write_whole(const std::vector<TensorSource>& tensors, Metadata metadata, const Texts& hashes) {
    metadata.insert(hashes.begin(), hashes.end());
    write_safetensors(directory_ / whole_file, tensors, metadata);
    remove_file(directory_ / index_file);
    files_ = {whole_file};
  }

  void write_shards(const std::vector<std::vector<TensorSource>>& shards, const Metadata& metadata,
                    const Texts& hashes);

  /// Removes the tensors that do not count any more.
  void remove_stale() {
    remove([&](const std::string& name) {
      return (name == whole_file || is_shard_name(name) || is_plain_shard_name(name)) && !files_.contains(name);
    });
  }

 private:
  static constexpr const char* new_shard =
      "shard.safetensors";  // of temporary files; only a holder of the lock has any

  template <class Wanted>
  void remove(Wanted&& wanted) {
    for (const std::string& name : names_in(directory_)) {
      struct stat status {};
      if (!wanted(name) || ::fstatat(folder_.get(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
      if (!S_ISREG(status.st_mode) && !S_ISLNK(status.st_mode)) continue;
      if (::unlinkat(folder_.get(), name.c_str(), 0) != 0 && errno != ENOENT)
        fail("cannot remove '", (directory_ / name).string(), "': ", errno_text(errno));
    }
  }

  std::filesystem::path directory_;
  Descriptor folder_;
  FolderLock lock_;
  std::set<std::string> files_;  // of the tensors that count, as far as an index names them
};

/// Shards get their names when all are there, and count from the moment at which the index has its.
inline void CheckpointWriter::write_shards(const std::vector<std::vector<TensorSource>>& shards,
                                           const Metadata& metadata, const Texts& hashes) {
  std::vector<TemporaryFile> written;
  std::uint64_t total_bytes = 0, hash = 0;
  for (const auto& shard : shards) {
    naming("cannot write a shard into", directory_, [&] {
      TemporaryFile& file = written.emplace_back(folder_.get(), new_shard);
      FileWriter out(file.file().get());
      emit_safetensors(shard, metadata, [&](std::span<const std::byte> bytes) {
        hash = content_hash(bytes, hash);
        out.write(bytes);
      });
      out.sync();
      if (file.file().close() != 0) fail(errno_text(errno), " (closing)");
    });
  }
  nlohmann::json index;
  files_.clear();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shard_name(hash_text(hash), i, shards.size());
    for (const TensorSource& tensor : shards[i]) {
      index["weight_map"][tensor.name] = name;
      total_bytes += bytes_of(tensor);
    }
    written[i].rename_to(name);
    files_.insert(name);
  }
  sync_folder(folder_.get());
  for (const auto& [name, of_text] : hashes) index["metadata"][name] = of_text;
  index["metadata"]["total_size"] = total_bytes;
  replace_file(directory_ / index_file, [&](FileWriter& out) { out.write(index.dump(2) + "\n"); });
}

/// Throws unless every file that a save replaces can be: a regular one, or none.
inline void check_replaceable(const std::filesystem::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
    fail("cannot write '", path.string(), "': wanted a regular file to replace, came ", kind_text(status.st_mode));
}

}  // namespace detail

inline void write_sharded_safetensors(const std::filesystem::path& directory, const std::vector<TensorSource>& tensors,
                                      const Metadata& metadata, std::uint64_t max_shard_bytes,
                                      const std::map<std::string, std::string>& texts) {
  const auto shards = detail::split_into_shards(tensors, max_shard_bytes);
  std::set<std::string_view> names;
  for (const TensorSource& tensor : tensors)
    require(names.insert(tensor.name).second, "safetensors: two tensors are named ", detail::quote(tensor.name));
  for (const auto& [name, text] : texts) {
    require(detail::is_plain_file_name(name), "wanted the name of a file in '", directory.string(), "', came ",
            detail::quote(name));
    detail::check_replaceable(directory / name);
  }
  detail::check_replaceable(directory / detail::whole_file);
  detail::check_replaceable(directory / detail::index_file);

  detail::CheckpointWriter writer(directory);
  writer.tidy();
  try {
    const auto hashes = writer.prepare_texts(texts);
    if (shards.size() == 1 && writer.can_be_whole())
      writer.write_whole(shards[0], metadata, hashes);
    else
      writer.write_shards(shards, metadata, hashes);
    writer.put_texts(hashes);
    writer.remove_stale();
  } catch (...) {
    try {
      writer.tidy();
    } catch (const Error&) {  // the first one says what is wrong
    }
    throw;
  }
}

}  // namespace zamba
