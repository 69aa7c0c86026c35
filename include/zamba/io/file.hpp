// SPDX-License-Identifier: MIT
// Files: MappedFile, a read-only view of a whole file, and replace_file, which writes a file or leaves the old one.
// Nothing here waits for another program: what is no regular file is refused, or written to if that is possible at
// once.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/io/folder.hpp>

namespace zamba {

/// A whole file, mapped read-only. An empty file gives an empty span. The pages are read when they are first touched,
/// so a file that another process shortens meanwhile ends the program; replace_file, below, never does that to a
/// reader.
class MappedFile {
 public:
  MappedFile() = default;

  explicit MappedFile(const std::filesystem::path& path) : MappedFile() {
    if (!map(path)) fail("cannot open '", path.string(), "': ", detail::errno_text(ENOENT));
  }
  /// The file, or nothing where there is none of that name.
  static std::optional<MappedFile> open_if_there(const std::filesystem::path& path) {
    MappedFile file;
    return file.map(path) ? std::optional(std::move(file)) : std::nullopt;
  }

  MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})), status_(other.status_) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(status_, other.status_);
    return *this;
  }
  ~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }

  /// Stays where it is when the MappedFile is moved.
  std::span<const std::byte> bytes() const { return bytes_; }

  std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()}; }

  /// Whether the path still leads to this file, which then was neither replaced nor removed.
  bool is_at(const std::filesystem::path& path) const {
    struct stat status {};
    return ::stat(path.c_str(), &status) == 0 && detail::is_same_file(status, status_);
  }

  /// Lets go of the memory of the pages that hold `part`, if it is of this file: they are read again when they are
  /// touched again. Whoever reads a file larger than memory once calls this behind the reading.
  void release(std::span<const std::byte> part) const {
    const std::less_equal<const std::byte*> before;  // defined for pointers into anything, as < is not
    if (part.empty() || !before(bytes_.data(), part.data()) ||
        !before(part.data() + part.size(), bytes_.data() + bytes_.size())) {
      return;
    }
    // From the beginning of a huge page: a fault maps the pages around it, those before it among them.
    const auto* const first = part.data() - reinterpret_cast<std::uintptr_t>(part.data()) % (std::uintptr_t{1} << 21);
    const auto* const begin = before(first, bytes_.data()) ? bytes_.data() : first;
    // A hint: where the system does not take it, the pages stay until it needs them.
    ::madvise(const_cast<std::byte*>(begin), static_cast<std::size_t>(part.data() + part.size() - begin),
              MADV_DONTNEED);
  }

 private:
  /// False where there is no such file.
  bool map(const std::filesystem::path& path) {
    // Without O_NONBLOCK, a pipe would be waited for here, before it is known to be one.
    constexpr int flags = O_RDONLY | O_CLOEXEC | O_NOCTTY;
    int fd = ::open(path.c_str(), flags | O_NONBLOCK);
    if (fd < 0 && errno == EWOULDBLOCK) fd = ::open(path.c_str(), flags);  // a file that another host has on lease
    if (fd < 0 && errno == ENOENT) return false;
    if (fd < 0) fail("cannot open '", path.string(), "': ", detail::errno_text(errno));
    const detail::Descriptor file(fd);
    if (::fstat(fd, &status_) != 0) fail("cannot read '", path.string(), "': ", detail::errno_text(errno));
    if (!S_ISREG(status_.st_mode))
      fail("cannot read '", path.string(), "': wanted a regular file, came ", detail::kind_text(status_.st_mode));
    if (status_.st_size == 0) return true;
    const auto size = static_cast<std::size_t>(status_.st_size);
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) fail("cannot map '", path.string(), "': ", detail::errno_text(errno));
    bytes_ = {static_cast<const std::byte*>(data), size};
    require(!is_lfs_pointer(), "'", path.string(),
            "' is a pointer of Git LFS, not the file itself: fetch that by `git lfs pull`");
    return true;
  }

  /// What a clone without Git LFS holds in place of a large file: some lines of text.
  bool is_lfs_pointer() const {
    constexpr std::string_view begin = "version https://git-lfs.github.com/spec/";
    constexpr std::size_t longest = 1024;
    return text().size() < longest && text().starts_with(begin);
  }

  std::span<const std::byte> bytes_;
  struct stat status_ {};  // the mapping keeps its number from being given to another file
};

/// Buffered writing to a file descriptor, which it does not own. Throws Error with the errno text and the position.
/// Nothing is written on destruction: only flush() or sync() say that what was written has arrived.
class FileWriter {
 public:
  explicit FileWriter(int descriptor) : descriptor_(descriptor) { buffer_.reserve(capacity); }
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  void write(std::span<const std::byte> bytes) {
    if (buffer_.size() + bytes.size() > capacity) flush();
    if (bytes.size() > capacity) {
      write_through(bytes);
    } else {
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    }
  }

  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  /// Hands what is buffered to the system.
  void flush() {
    write_through(buffer_);
    buffer_.clear();
  }

  /// flush(), and returns when the disk has it.
  void sync() {
    flush();
    if (::fsync(descriptor_) != 0) fail(detail::errno_text(errno), " (flushing ", written_, " bytes to the disk)");
  }

 private:
  static constexpr std::size_t capacity = 1 << 16;

  void write_through(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail(detail::errno_text(errno), " (after ", written_, " bytes)");
      written_ += static_cast<std::size_t>(count);
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
  }

  int descriptor_;
  std::size_t written_ = 0;
  std::vector<std::byte> buffer_;
};

namespace detail {

/// Whether a path is a link that stands for a descriptor of this program, as /dev/stdout leads to. What is behind it
/// may have no name, as a pipe has none.
inline bool is_descriptor(const std::filesystem::path& path) {
  return path.parent_path() == "/dev/fd" || path.parent_path() == "/proc/self/fd";
}

/// Where a path leads through links.
inline std::filesystem::path follow_links(std::filesystem::path path) {
  struct stat status {};
  for (int links = 0; !is_descriptor(path) && ::lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode); ++links) {
    std::error_code error;
    const auto target = std::filesystem::read_symlink(path, error);
    if (error || links == 40) fail(error ? error.message() : errno_text(ELOOP));
    path = path.parent_path() / target;
  }
  return path;
}

/// Opens what is written to in place: a device, a pipe that is read, or a descriptor where it is.
inline Descriptor open_stream(const std::filesystem::path& path, mode_t mode) {
  if (is_descriptor(path)) {
    Descriptor result(::fcntl(std::atoi(path.filename().c_str()), F_DUPFD_CLOEXEC, 0));
    if (result.get() < 0) fail(errno_text(errno));
    return result;
  }
  if (!S_ISCHR(mode) && !S_ISFIFO(mode)) fail("wanted a file, came ", kind_text(mode));
  Descriptor result(::open(path.c_str(), O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (result.get() < 0) fail(errno == ENXIO && S_ISFIFO(mode) ? "a pipe that nobody reads" : errno_text(errno));
  ::fcntl(result.get(), F_SETFL, ::fcntl(result.get(), F_GETFL) & ~O_NONBLOCK);
  return result;
}

/// Writes a new file beside `path` and renames it over that.
inline void write_and_rename(const std::filesystem::path& path, const std::function<void(FileWriter&)>& writer) {
  const std::string name = path.filename().string();
  const Descriptor folder = open_folder(folder_of(path));
  remove_left_over(folder_of(path), folder.get(), [&](std::string_view stem) { return stem == name; });
  {
    TemporaryFile temporary(folder.get(), name);
    const Descriptor lock(::fcntl(temporary.file().get(), F_DUPFD_CLOEXEC, 0));  // keeps it locked until it is renamed
    FileWriter out(temporary.file().get());
    writer(out);
    out.sync();
    if (temporary.file().close() != 0) fail(errno_text(errno), " (closing)");
    temporary.rename_to(name);
  }
  sync_folder(folder.get());  // the rename itself reaches the disk with it
}

/// Calls f; whatever it throws becomes an Error that begins with `what` and the path.
template <class F>
void naming(const char* what, const std::filesystem::path& path, F&& f) {
  std::string cause = "unknown exception";
  try {
    return f();
  } catch (const std::exception& error) {
    cause = error.what();
  } catch (...) {
  }
  if (cause.starts_with("zamba: ")) cause.erase(0, 7);
  fail(what, " '", path.string(), "': ", cause);
}

}  // namespace detail

/// Whether a path leads to something. Throws where that cannot be known, as in a folder that may not be looked into.
inline bool is_there(const std::filesystem::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0) return true;
  if (errno != ENOENT && errno != ENOTDIR) fail("cannot look for '", path.string(), "': ", detail::errno_text(errno));
  return false;
}

inline bool is_folder(const std::filesystem::path& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

/// Removes a file, if there is one, and returns when the disk knows.
inline void remove_file(const std::filesystem::path& path) {
  if (::unlink(path.c_str()) != 0) {
    if (errno == ENOENT) return;
    fail("cannot remove '", path.string(), "': ", detail::errno_text(errno));
  }
  const detail::Descriptor folder = detail::open_folder(detail::folder_of(path));
  detail::sync_folder(folder.get());
}

/// Writes a file under a temporary name in the same folder, flushes it to the disk and renames it over `path`: a
/// reader, or a machine that stops at any moment, sees the whole old file or the whole new one. Where anything fails,
/// an exception of `writer` included, the temporary file is removed, the old file stays, and Error names path and
/// cause. The new file has the default permissions. A symbolic link stays, and what it leads to is replaced. What
/// killed writers of the same file left is removed.
/// Only regular files are replaced. A device, or a pipe that somebody reads, is written to; anything else is an Error.
inline void replace_file(const std::filesystem::path& path, const std::function<void(FileWriter&)>& writer) {
  detail::naming("cannot write", path, [&] {
    require(path.has_filename(), "wanted the name of a file, came that of a folder");
    const std::filesystem::path target = detail::follow_links(path);
    struct stat status {};
    const bool there = ::stat(target.c_str(), &status) == 0;
    if (!there && errno != ENOENT) fail(detail::errno_text(errno));
    if (there && S_ISDIR(status.st_mode)) fail(detail::errno_text(EISDIR));
    if (!there || (S_ISREG(status.st_mode) && !detail::is_descriptor(target)))
      return detail::write_and_rename(target, writer);
    detail::Descriptor stream = detail::open_stream(target, status.st_mode);
    FileWriter out(stream.get());
    writer(out);
    out.flush();
    if (stream.close() != 0) fail(detail::errno_text(errno), " (closing)");
  });
}

}  // namespace zamba
