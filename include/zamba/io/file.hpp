// SPDX-License-Identifier: MIT
// Files: MappedFile, a read-only view of a whole file, and replace_file, which writes a file or leaves the old one.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <zamba/error.hpp>

namespace zamba {

namespace detail {

/// The text of an errno value. std::strerror is not safe to call from several threads.
inline std::string errno_text(int error) { return std::generic_category().message(error); }

/// A file descriptor, closed at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int get() const { return fd_; }
  /// Closes now, and reports what close() reports: network file systems tell of a full disk only here.
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

}  // namespace detail

/// A whole file, mapped read-only. An empty file gives an empty span. The pages are read when they are first touched,
/// so a file that another process shortens meanwhile ends the program; replace_file, below, never does that to a
/// reader.
class MappedFile {
 public:
  MappedFile() = default;

  explicit MappedFile(const std::filesystem::path& path) {
    const detail::Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) fail("cannot open '", path.string(), "': ", detail::errno_text(errno));
    struct stat status {};
    if (::fstat(file.get(), &status) != 0) fail("cannot read '", path.string(), "': ", detail::errno_text(errno));
    if (!S_ISREG(status.st_mode)) {
      fail("cannot read '", path.string(), "': wanted a regular file, came ",
           S_ISDIR(status.st_mode) ? "a folder" : "a device, pipe or socket");
    }
    if (status.st_size == 0) return;
    void* data = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (data == MAP_FAILED) fail("cannot map '", path.string(), "': ", detail::errno_text(errno));
    bytes_ = {static_cast<const std::byte*>(data), static_cast<std::size_t>(status.st_size)};
    if (is_lfs_pointer()) {
      ::munmap(data, bytes_.size());
      fail("'", path.string(), "' is a pointer of Git LFS, not the file itself: fetch that by `git lfs pull`");
    }
  }

  MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }

  /// Stays where it is when the MappedFile is moved.
  std::span<const std::byte> bytes() const { return bytes_; }

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
  /// What a clone without Git LFS holds in place of a large file: some lines of text.
  bool is_lfs_pointer() const {
    constexpr std::string_view begin = "version https://git-lfs.github.com/spec/";
    constexpr std::size_t longest = 1024;
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
    return text.size() < longest && text.starts_with(begin);
  }

  std::span<const std::byte> bytes_;
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

/// Returns when the disk has the names in a folder; file systems that cannot flush one say EINVAL.
inline void sync_folder(int folder) {
  if (::fsync(folder) != 0 && errno != EINVAL) fail("the folder was not flushed: ", errno_text(errno));
}

/// A new file in `folder`, removed at the end of the scope unless it was renamed before.
class TemporaryFile {
 public:
  /// The name is `stem` with the process and a counter; one left by a killed process of the same number is skipped.
  TemporaryFile(int folder, const std::string& stem) : folder_(folder), file_(create(folder, stem, name_)) {}
  ~TemporaryFile() {
    if (!name_.empty()) ::unlinkat(folder_, name_.c_str(), 0);
  }

  Descriptor& file() { return file_; }

  void rename_to(const std::string& name) {
    if (::renameat(folder_, name_.c_str(), folder_, name.c_str()) != 0) {
      fail(errno_text(errno), " (renaming '", name_, "')");
    }
    name_.clear();
  }

 private:
  static int create(int folder, const std::string& stem, std::string& name) {
    static std::atomic<unsigned> counter{0};
    for (;;) {
      name = stem + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
      const int fd = ::openat(folder, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd >= 0) return fd;
      if (errno != EEXIST) fail(errno_text(errno), " (creating '", name, "')");
    }
  }

  int folder_;
  std::string name_;
  Descriptor file_;
};

}  // namespace detail

/// Removes a file, if there is one, and returns when the disk knows.
inline void remove_file(const std::filesystem::path& path) {
  if (::unlink(path.c_str()) != 0) {
    if (errno == ENOENT) return;
    fail("cannot remove '", path.string(), "': ", detail::errno_text(errno));
  }
  const std::filesystem::path parent = path.has_parent_path() ? path.parent_path() : ".";
  const detail::Descriptor folder(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() >= 0) detail::sync_folder(folder.get());
}

/// Writes a file under a temporary name in the same folder, flushes it to the disk and renames it over `path`: a
/// reader, or a machine that stops at any moment, sees the whole old file or the whole new one. Where anything fails,
/// an exception of `writer` included, the temporary file is removed, the old file stays, and Error names path and
/// cause. The new file has the default permissions; a symbolic link at `path` is replaced, not followed.
inline void replace_file(const std::filesystem::path& path, const std::function<void(FileWriter&)>& writer) {
  std::string cause = "unknown exception";
  try {
    const std::string name = path.filename().string();
    require(!name.empty(), "wanted the name of a file, came that of a folder");
    const std::filesystem::path parent = path.has_parent_path() ? path.parent_path() : ".";
    const detail::Descriptor folder(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (folder.get() < 0) fail("folder '", parent.string(), "': ", detail::errno_text(errno));
    {
      detail::TemporaryFile temporary(folder.get(), name);
      FileWriter out(temporary.file().get());
      writer(out);
      out.sync();
      if (temporary.file().close() != 0) fail(detail::errno_text(errno), " (closing)");
      temporary.rename_to(name);
    }
    detail::sync_folder(folder.get());  // the rename itself reaches the disk with it
    return;
  } catch (const std::exception& error) {
    cause = error.what();
  } catch (...) {
  }
  if (cause.starts_with("zamba: ")) cause.erase(0, 7);
  fail("cannot write '", path.string(), "': ", cause);
}

}  // namespace zamba
