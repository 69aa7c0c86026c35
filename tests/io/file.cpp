// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <zamba/io/file.hpp>

namespace {

namespace fs = std::filesystem;

/// A folder of the test's own, removed at the end.
struct Folder {
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "zamba-file-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  ~Folder() { fs::remove_all(path); }

  std::size_t files() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(path), fs::directory_iterator()));
  }

  fs::path path;
};

std::string text_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string text_of(const zamba::MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

/// The message of the zamba::Error that f must throw.
template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const zamba::Error& error) {
    return error.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

}  // namespace

TEST_CASE("MappedFile gives the bytes of the file, and moves") {
  const Folder folder;
  const auto path = folder.path / "some bytes";
  std::ofstream(path, std::ios::binary) << std::string("a\0b", 3);
  zamba::MappedFile first(path);
  CHECK(text_of(first) == std::string("a\0b", 3));
  const auto* where = first.bytes().data();
  zamba::MappedFile second(std::move(first));
  CHECK(second.bytes().data() == where);
  CHECK(first.bytes().empty());
  zamba::MappedFile third;
  third = std::move(second);
  CHECK(text_of(third) == std::string("a\0b", 3));
}

TEST_CASE("MappedFile: an empty file is empty") {
  const Folder folder;
  std::ofstream(folder.path / "empty");
  CHECK(zamba::MappedFile(folder.path / "empty").bytes().empty());
}

TEST_CASE("MappedFile: what cannot be mapped is an error that names the path and the cause") {
  const Folder folder;
  const auto missing = (folder.path / "missing").string();
  const auto message = message_of([&] { zamba::MappedFile{missing}; });
  CHECK(contains(message, missing));
  CHECK(contains(message, "No such file or directory"));
  CHECK(contains(message_of([&] { zamba::MappedFile{folder.path}; }), "wanted a regular file, came a folder"));
  CHECK(contains(message_of([&] { zamba::MappedFile{"/dev/null"}; }), "wanted a regular file, came a device"));
}

TEST_CASE("MappedFile: a pointer of Git LFS is named") {
  const Folder folder;
  const auto path = folder.path / "model.safetensors";
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid sha256:" + std::string(64, 'a') + "\nsize 14464818\n";
  std::ofstream(path) << pointer;
  CHECK(contains(message_of([&] { zamba::MappedFile{path}; }), path.string() + "' is a pointer of Git LFS"));
  std::ofstream(path) << pointer << std::string(1024, ' ');  // no pointer is that long
  CHECK(zamba::MappedFile(path).bytes().size() > 1024);
}

TEST_CASE("replace_file writes a new file and replaces an old one") {
  const Folder folder;
  const auto path = folder.path / "file";
  zamba::replace_file(path, [](zamba::FileWriter& out) { out.write("old"); });
  CHECK(text_of(path) == "old");
  const zamba::MappedFile reader(path);

  // Pieces below, at and above the buffer's size, in an order that leaves it partly filled before each.
  std::string wanted;
  zamba::replace_file(path, [&](zamba::FileWriter& out) {
    for (const std::size_t size : {1u, 65535u, 65536u, 7u, 65537u, 300000u, 0u, 3u}) {
      const std::string piece(size, static_cast<char>('a' + size % 26));
      out.write(piece);
      wanted += piece;
    }
    CHECK(text_of(path) == "old");
  });
  CHECK(text_of(path) == wanted);
  CHECK(text_of(reader) == "old");
  CHECK(folder.files() == 1);
}

TEST_CASE("replace_file: a path without a folder is in the current one") {
  const Folder folder;
  const auto before = fs::current_path();
  fs::current_path(folder.path);
  const auto message = message_of([] { zamba::replace_file("plain", [](zamba::FileWriter& out) { out.write("x"); }); });
  fs::current_path(before);
  CHECK(message == "no error");
  CHECK(text_of(folder.path / "plain") == "x");
}

TEST_CASE("replace_file: an exception of the writer leaves the old file and nothing beside it") {
  const Folder folder;
  const auto path = folder.path / "file";
  std::ofstream(path) << "old";
  const auto failing = [&](auto&& what) {
    return message_of([&] {
      zamba::replace_file(path, [&](zamba::FileWriter& out) {
        out.write("new");
        out.flush();
        CHECK(folder.files() == 2);
        throw what;
      });
    });
  };
  CHECK(failing(std::runtime_error("the cause")) == "zamba: cannot write '" + path.string() + "': the cause");
  CHECK(failing(zamba::Error("zamba: another")) == "zamba: cannot write '" + path.string() + "': another");
  CHECK(failing(7) == "zamba: cannot write '" + path.string() + "': unknown exception");
  CHECK(text_of(path) == "old");
  CHECK(folder.files() == 1);
}

TEST_CASE("replace_file: no folder, a folder in the way, no name") {
  const Folder folder;
  const auto nothing = [](zamba::FileWriter&) {};
  const auto missing = (folder.path / "missing" / "file").string();
  const auto message = message_of([&] { zamba::replace_file(missing, nothing); });
  CHECK(contains(message, "cannot write '" + missing + "'"));
  CHECK(contains(message, "No such file or directory"));
  fs::create_directories(folder.path / "taken");
  CHECK(contains(message_of([&] { zamba::replace_file(folder.path / "taken", nothing); }), "Is a directory"));
  CHECK(contains(message_of([&] { zamba::replace_file(folder.path / "", nothing); }), "wanted the name of a file"));
  CHECK(folder.files() == 1);
}

TEST_CASE("replace_file: a full disk leaves the old file and nothing beside it") {
  // A limit on the size of files stands for the disk: write() stores a part and then fails, for root as well.
  const Folder folder;
  const auto path = folder.path / "file";
  std::ofstream(path) << "old";
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto limited = [&](std::size_t size) {
    rlimit limit = before;
    limit.rlim_cur = 100'000;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const auto message = message_of(
        [&] { zamba::replace_file(path, [&](zamba::FileWriter& out) { out.write(std::string(size, 'x')); }); });
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    return message;
  };
  const auto message = limited(200'000);
  CHECK(contains(message, "cannot write '" + path.string() + "'"));
  CHECK(contains(message, "File too large (after 100000 bytes)"));
  CHECK(text_of(path) == "old");
  CHECK(folder.files() == 1);
  CHECK(limited(100'000) == "no error");
  CHECK(text_of(path).size() == 100'000);
  std::signal(SIGXFSZ, handler);
}
