// SPDX-License-Identifier: MIT
// What writing files into a folder takes: descriptors, new files beside the old ones, what killed writers left of them,
// and a lock that writers of several files hold.
// Locks are those of flock(): they end with their process, however it ends. Where a file system has none, writers do
// not wait for each other, and nothing that was left is removed.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <zamba/error.hpp>

namespace zamba::detail {

/// The text of an errno value. std::strerror is not safe to call from several threads.
inline std::string errno_text(int error) { return std::generic_category().message(error); }

/// A file descriptor, closed at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  /// Closes now, and reports what close() reports: network file systems tell of a full disk only here.
  int close() { return ::close(release()); }

 private:
  int fd_;
};

/// What a file is, for messages.
inline const char* kind_text(mode_t mode) {
  return S_ISREG(mode)    ? "a regular file"
         : S_ISDIR(mode)  ? "a folder"
         : S_ISFIFO(mode) ? "a pipe"
         : S_ISSOCK(mode) ? "a socket"
         : S_ISBLK(mode)  ? "a block device"
                          : "a device";
}

/// The folder that holds a file.
inline std::filesystem::path folder_of(const std::filesystem::path& file) {
  return file.has_parent_path() ? file.parent_path() : ".";
}

inline Descriptor open_folder(const std::filesystem::path& folder) {
  Descriptor result(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (result.get() < 0) fail("folder '", folder.string(), "': ", errno_text(errno));
  return result;
}

/// Returns when the disk has the names in a folder; file systems that cannot flush one say EINVAL.
inline void sync_folder(int folder) {
  if (::fsync(folder) != 0 && errno != EINVAL) fail("the folder was not flushed: ", errno_text(errno));
}

/// The names of all that a folder holds.
inline std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::error_code error;
  std::vector<std::string> names;
  for (std::filesystem::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
    names.push_back(at->path().filename().string());
  if (error) fail("cannot list the folder '", folder.string(), "': ", error.message());
  return names;
}

inline bool is_same_file(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/// A new file in a folder, removed at the end of the scope unless it was renamed before. Until then it is locked, which
/// tells others that its writer lives.
class TemporaryFile {
 public:
  /// The name is `stem` with the process and a counter; one left by a killed process of the same number is skipped.
  TemporaryFile(int folder, const std::string& stem) : folder_(folder), file_(create(folder, stem, name_)) {}
  ~TemporaryFile() {
    if (!name_.empty()) ::unlinkat(folder_, name_.c_str(), 0);
  }
  TemporaryFile(TemporaryFile&& other) noexcept
      : folder_(other.folder_), name_(std::exchange(other.name_, {})), file_(std::move(other.file_)) {}
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  Descriptor& file() { return file_; }

  void rename_to(const std::string& name) {
    if (::renameat(folder_, name_.c_str(), folder_, name.c_str()) != 0)
      fail(errno_text(errno), " (renaming '", name_, "')");
    name_.clear();
  }

  /// The stem, or nothing where no temporary file is named so.
  static std::string_view stem_of(std::string_view name) {
    const auto number = [&](std::string_view before) {
      const std::size_t end = name.size();
      while (!name.empty() && name.back() >= '0' && name.back() <= '9') name.remove_suffix(1);
      if (name.size() == end || !name.ends_with(before)) return false;
      name.remove_suffix(before.size());
      return true;
    };
    return number("-") && number(mark) ? name : std::string_view();
  }

 private:
  static constexpr std::string_view mark = ".tmp-";

  static int create(int folder, const std::string& stem, std::string& name) {
    static std::atomic<unsigned> counter{0};
    for (;;) {
      name = stem + std::string(mark) + std::to_string(::getpid()) + "-" + std::to_string(counter++);
      const int fd = ::openat(folder, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd < 0 && errno == EEXIST) continue;
      if (fd < 0) fail(errno_text(errno), " (creating '", name, "')");
      struct stat status {};
      ::flock(fd, LOCK_EX);
      if (::fstat(fd, &status) != 0 || status.st_nlink > 0) return fd;
      ::close(fd);  // it was taken for a left-over one before it was locked
    }
  }

  int folder_;
  std::string name_;
  Descriptor file_;
};

/// Removes temporary files whose writers were killed; those whose stem `wanted` accepts.
template <class Wanted>
void remove_left_over(const std::filesystem::path& folder, int descriptor, Wanted&& wanted) {
  for (const std::string& name : names_in(folder)) {
    const std::string_view stem = TemporaryFile::stem_of(name);
    if (stem.empty() || !wanted(stem)) continue;
    const Descriptor file(
        ::openat(descriptor, name.c_str(), O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC));
    if (file.get() >= 0 && ::flock(file.get(), LOCK_EX | LOCK_NB) == 0) ::unlinkat(descriptor, name.c_str(), 0);
  }
}

/// Held by one writer of a folder at a time; the next one waits. It is a lock on a file that is there meanwhile.
class FolderLock {
 public:
  explicit FolderLock(int folder) : folder_(folder), file_(take(folder)) {}
  ~FolderLock() { ::unlinkat(folder_, name, 0); }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  static constexpr const char* name = ".zamba.lock";

  static int take(int folder) {
    constexpr int flags = O_CREAT | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC;
    for (;;) {
      int fd = ::openat(folder, name, O_RDWR | flags, 0666);
      if (fd < 0 && errno == EACCES) fd = ::openat(folder, name, O_RDONLY | flags, 0666);  // left by another user
      if (fd < 0) fail("cannot lock the folder: '", name, "': ", errno_text(errno));
      Descriptor file(fd);
      int error = 0;
      while ((error = ::flock(fd, LOCK_EX)) != 0 && errno == EINTR) {
      }
      struct stat locked {
      }, named{};
      // Whoever had it before has removed it, and a third one may hold the next.
      if (error != 0 || (::fstat(fd, &locked) == 0 && ::fstatat(folder, name, &named, AT_SYMLINK_NOFOLLOW) == 0 &&
                         is_same_file(locked, named)))
        return file.release();
    }
  }

  int folder_;
  Descriptor file_;
};

}  // namespace zamba::detail
