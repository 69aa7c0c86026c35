// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

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
  const auto loop = folder.path / "loop";
  fs::create_symlink(loop, loop);
  CHECK(contains(message_of([&] { zamba::MappedFile{loop}; }), "Too many levels of symbolic links"));
  CHECK(contains(message_of([&] { zamba::MappedFile{std::string(5000, 'x')}; }), "File name too long"));
}

TEST_CASE("MappedFile: a pipe is refused without waiting for who writes into it") {
  const Folder folder;
  const auto pipe = folder.path / "pipe", link = folder.path / "link";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  fs::create_symlink("pipe", link);
  for (const auto& path : {pipe, link}) {
    const auto message = message_of([&] { zamba::MappedFile{path}; });
    CHECK(message == "zamba: cannot read '" + path.string() + "': wanted a regular file, came a pipe");
  }
}

TEST_CASE("MappedFile: a file that may be missing, and whether it is still at its path") {
  const Folder folder;
  const auto path = folder.path / "file";
  CHECK_FALSE(zamba::MappedFile::open_if_there(path).has_value());
  CHECK_THROWS_AS(zamba::MappedFile::open_if_there(folder.path), zamba::Error);
  std::ofstream(path) << "old";
  const auto file = zamba::MappedFile::open_if_there(path);
  REQUIRE(file.has_value());
  CHECK(file->text() == "old");
  CHECK(file->is_at(path));
  for (int time = 0; time < 5; ++time) {  // also where the disk uses numbers again
    zamba::replace_file(path, [](zamba::FileWriter& out) { out.write("old"); });
    CHECK_FALSE(file->is_at(path));
  }
  fs::remove(path);
  CHECK_FALSE(file->is_at(path));
}

TEST_CASE("is_there and is_folder") {
  const Folder folder;
  std::ofstream(folder.path / "file") << "x";
  fs::create_symlink("nothing", folder.path / "dangling");
  fs::create_symlink("loop", folder.path / "loop");
  CHECK(zamba::is_there(folder.path / "file"));
  CHECK_FALSE(zamba::is_there(folder.path / "dangling"));
  CHECK_FALSE(zamba::is_there(folder.path / "file" / "below"));
  CHECK(contains(message_of([&] { zamba::is_there(folder.path / "loop"); }), "cannot look for '"));
  CHECK(zamba::is_folder(folder.path));
  CHECK_FALSE(zamba::is_folder(folder.path / "file"));
  CHECK_FALSE(zamba::is_folder(folder.path / "loop"));
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

TEST_CASE("replace_file: a link stays, and the file that it leads to is replaced") {
  const Folder folder;
  fs::create_directories(folder.path / "far" / "away");
  const auto file = folder.path / "far" / "file", link = folder.path / "link";
  std::ofstream(file) << "old";
  fs::create_symlink("../file", folder.path / "far" / "away" / "second");
  fs::create_symlink("far/away/second", link);
  zamba::replace_file(link, [](zamba::FileWriter& out) { out.write("new"); });
  CHECK(text_of(file) == "new");
  CHECK(fs::is_symlink(link));
  CHECK(fs::is_symlink(folder.path / "far" / "away" / "second"));

  fs::remove(file);  // and where it leads to nothing, that is made
  zamba::replace_file(link, [](zamba::FileWriter& out) { out.write("again"); });
  CHECK(text_of(file) == "again");
  fs::create_symlink("loop", folder.path / "loop");
  CHECK(contains(message_of([&] { zamba::replace_file(folder.path / "loop", [](auto&) {}); }),
                 "Too many levels of symbolic links"));
}

TEST_CASE("replace_file: a device is written to and stays, and tells what is wrong") {
  const Folder folder;
  const auto make = [&](const char* name, unsigned number) {
    const auto path = folder.path / name;
    // A device of the test's own, which root could replace; others cannot make one, nor replace the system's.
    if (::mknod(path.c_str(), S_IFCHR | 0666, ::makedev(1, number)) == 0) return path;
    return fs::path("/dev") / name;
  };
  const auto null = make("null", 3), full = make("full", 7);
  CHECK(message_of([&] { zamba::replace_file(null, [](zamba::FileWriter& out) { out.write("text"); }); }) ==
        "no error");
  CHECK(fs::is_character_file(null));
  fs::create_symlink(null, folder.path / "link");
  CHECK(message_of([&] {
          zamba::replace_file(folder.path / "link", [](zamba::FileWriter& out) { out.write("text"); });
        }) == "no error");
  CHECK(fs::is_symlink(folder.path / "link"));
  CHECK(fs::is_character_file(null));
  const auto message =
      message_of([&] { zamba::replace_file(full, [](zamba::FileWriter& out) { out.write("text"); }); });
  CHECK(contains(message, "cannot write '" + full.string() + "': No space left on device"));
  CHECK(fs::is_character_file(full));
}

TEST_CASE("replace_file: a pipe that is read gets the text, one that nobody reads and a socket are refused") {
  const Folder folder;
  const auto pipe = folder.path / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  const auto write = [](const fs::path& path) {
    return message_of([&] { zamba::replace_file(path, [](zamba::FileWriter& out) { out.write("text"); }); });
  };
  CHECK(write(pipe) == "zamba: cannot write '" + pipe.string() + "': a pipe that nobody reads");
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  REQUIRE(reader >= 0);
  CHECK(write(pipe) == "no error");
  char text[8] = {};
  CHECK(::read(reader, text, sizeof text) == 4);
  CHECK(std::string(text) == "text");
  CHECK(fs::is_fifo(pipe));

  const int descriptors[2] = {::socket(AF_UNIX, SOCK_STREAM, 0), reader};
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  (folder.path / "socket").string().copy(address.sun_path, sizeof address.sun_path - 1);
  REQUIRE(::bind(descriptors[0], reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  CHECK(contains(write(folder.path / "socket"), "wanted a file, came a socket"));
  CHECK(fs::is_socket(folder.path / "socket"));
  for (const int descriptor : descriptors) ::close(descriptor);
}

TEST_CASE("replace_file: descriptors by name are written where they are") {
  const Folder folder;
  const auto path = folder.path / "file";
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT, 0600);
  REQUIRE(::write(file, "before ", 7) == 7);
  for (const char* name : {"/dev/fd/", "/proc/self/fd/"})
    zamba::replace_file(name + std::to_string(file), [](zamba::FileWriter& out) { out.write("text "); });
  REQUIRE(::write(file, "after", 5) == 5);
  CHECK(text_of(path) == "before text text after");
  ::close(file);
  CHECK(message_of([&] { zamba::replace_file("/dev/fd/" + std::to_string(file), [](auto&) {}); }) != "no error");
  int pipe[2];
  REQUIRE(::pipe(pipe) == 0);
  fs::create_symlink("/proc/self/fd/" + std::to_string(pipe[1]), folder.path / "link");
  zamba::replace_file(folder.path / "link", [](zamba::FileWriter& out) { out.write("text"); });
  char text[8] = {};
  CHECK(::read(pipe[0], text, sizeof text) == 4);
  ::close(pipe[0]);
  ::close(pipe[1]);
}

TEST_CASE("replace_file removes what killed writers of the file left, and nothing of those that live") {
  const Folder folder;
  const auto path = folder.path / "file";
  const auto killed = [&](const fs::path& file) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) zamba::replace_file(file, [](zamba::FileWriter&) { ::_exit(1); });
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
  };
  killed(path);
  killed(path);
  killed(folder.path / "other");
  for (const char* name : {"file.tmp-", "file.tmp-1-", "file.tmp-a-1", "file.tmp-1", "my file.tmp-1-2"})
    std::ofstream(folder.path / name) << "of the user";
  CHECK(folder.files() == 7);
  zamba::replace_file(path, [&](zamba::FileWriter& out) {
    CHECK(folder.files() == 7);  // the new one, that of the other file, and the user's
    zamba::replace_file(path, [](zamba::FileWriter& inner) { inner.write("inner"); });
    CHECK(folder.files() == 8);
    out.write("outer");
  });
  CHECK(text_of(path) == "outer");
  CHECK(folder.files() == 7);
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
