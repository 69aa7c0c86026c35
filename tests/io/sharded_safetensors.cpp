// SPDX-License-Identifier: MIT
// Shards and their index: what is written, read and refused; what readers meet while others write, and what a machine
// that stops while writing leaves.
#include <zamba/io/sharded_safetensors.hpp>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <thread>

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <zamba/random.hpp>

#include <tests/support/cases.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

/// Calls that change a folder until the process ends before the next one; negative: it goes on.
int changes_left = -1;

void before_change() {
  if (changes_left >= 0 && changes_left-- == 0) ::_exit(1);
}

}  // namespace

// In place of the C library's, for the whole test program.
extern "C" {
int renameat(int from, const char* name, int to, const char* other) noexcept {
  before_change();
  return static_cast<int>(::syscall(SYS_renameat2, from, name, to, other, 0));
}
int unlink(const char* path) noexcept {
  before_change();
  return static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}
int unlinkat(int folder, const char* path, int flags) noexcept {
  before_change();
  return static_cast<int>(::syscall(SYS_unlinkat, folder, path, flags));
}
int fsync(int file) {
  before_change();
  return ::fcntl(file, F_GETFD) < 0 ? -1 : 0;  // nothing here outlives the machine, and a disk takes its time
}
}

namespace {

using Values = std::map<std::string, std::vector<float>>;

constexpr const char* index_name = "model.safetensors.index.json";

/// Tensors a to e of 10, 20, 30, 1 and 1 floats; `mark` is in each.
Values values_of(float mark) {
  return {{"a", std::vector<float>(10, mark)},
          {"b", std::vector<float>(20, mark)},
          {"c", std::vector<float>(30, mark)},
          {"d", {mark}},
          {"e", {mark}}};
}

std::vector<TensorSource> sources_of(const Values& values) {
  std::vector<TensorSource> sources;
  for (const auto& [name, elements] : values)
    sources.push_back({name, DType::F32, {static_cast<Index>(elements.size())}, [elements = elements] {
                         return std::as_bytes(std::span(elements));
                       }});
  return sources;
}

/// With 120 bytes: a and b, c, d and e. The text has the mark too.
void write(const std::filesystem::path& folder, float mark, std::uint64_t max_shard_bytes) {
  write_sharded_safetensors(folder, sources_of(values_of(mark)), {{"format", "pt"}}, max_shard_bytes,
                            {{"config.json", std::to_string(mark)}});
}

Values read(const std::filesystem::path& folder) {
  const auto file = ShardedSafetensors::open(folder);
  Values values;
  for (const std::string& name : file.names()) values[name] = read_values<float>(*file.find(name));
  return values;
}

/// The mark of all tensors and of the text, or NaN where they are not of one write.
float mark_of(const std::filesystem::path& folder) {
  const auto file = ShardedSafetensors::open(folder, {"config.json"});
  Values values;
  for (const std::string& name : file.names()) values[name] = read_values<float>(*file.find(name));
  const float mark = values.at("a").at(0);
  const bool whole =
      values == values_of(mark) && file.text("config.json") && *file.text("config.json") == std::to_string(mark);
  return whole ? mark : std::numeric_limits<float>::quiet_NaN();
}

/// The names in a folder, with a zero for each digit of a hash.
std::set<std::string> files_in(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    std::string name = file.path().filename().string();
    if (detail::is_shard_name(name)) name.replace(6, 16, std::string(16, '0'));
    names.insert(name);
  }
  return names;
}

/// The name of shard i, 1 to 3, of three in a folder.
std::string shard(const std::filesystem::path& folder, int i) {
  for (const auto& file : std::filesystem::directory_iterator(folder))
    if (contains(file.path().string(), "-0000" + std::to_string(i) + "-of-")) return file.path().filename().string();
  return "";
}

const std::set<std::string> whole{"config.json", "model.safetensors"},
    three_shards{"config.json", "model-0000000000000000-00001-of-00003.safetensors",
                 "model-0000000000000000-00002-of-00003.safetensors",
                 "model-0000000000000000-00003-of-00003.safetensors", index_name};

/// A process that does `work`.
pid_t start(const std::function<void()>& work) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child != 0) return child;
  try {
    work();
  } catch (...) {
    ::_exit(2);
  }
  ::_exit(0);
}

int status_of(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

/// What opening three shards says after the index was edited.
std::string refusal(const std::function<void(json&)>& edit,
                    const std::function<void(const std::filesystem::path&)>& damage = {}) {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  json index = json::parse(read_text(folder.path / index_name));
  edit(index);
  write_text(folder.path / index_name, index.dump());
  if (damage) damage(folder.path);
  return message_of([&] { read(folder.path); });
}

}  // namespace

TEST_CASE("sharded_safetensors: tensors fill shards in order, and a large one has its own") {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  CHECK(files_in(folder.path) == three_shards);
  const json index = json::parse(read_text(folder.path / index_name));
  CHECK(index["metadata"]["total_size"] == 62 * sizeof(float));
  CHECK(index["metadata"]["config.json"] == detail::hash_of(read_text(folder.path / "config.json")));
  CHECK(index["weight_map"]["b"] == shard(folder.path, 1));
  CHECK(index["weight_map"]["c"] == shard(folder.path, 2));
  CHECK(index["weight_map"]["e"] == shard(folder.path, 3));
  CHECK(read(folder.path) == values_of(1));

  write(folder.path, 2, 1);  // each is larger than that
  CHECK(files_in(folder.path).size() == 7);
  CHECK(read(folder.path) == values_of(2));
  write(folder.path, 3, 62 * sizeof(float));  // all fit
  CHECK(files_in(folder.path) == whole);
  CHECK(read(folder.path) == values_of(3));
  write(folder.path, 4, std::uint64_t(-1));
  CHECK(read(folder.path) == values_of(4));
}

TEST_CASE("sharded_safetensors: equal tensors give equal names and bytes, whatever was there before") {
  const TemporaryFolder first, second;
  write(first.path, 1, 120);
  write(second.path, 7, 120);
  write_text(second.path / "tokenizer.json", "{}");
  write(second.path, 1, 120);
  CHECK(read_text(second.path / "tokenizer.json") == "{}");
  for (const auto& file : std::filesystem::directory_iterator(first.path))
    CHECK(read_text(file.path()) == read_text(second.path / file.path().filename()));
  CHECK(files_in(second.path).size() == 6);
  write(second.path, 1, 120);
  CHECK(mark_of(second.path) == 1);
}

TEST_CASE("sharded_safetensors: contents that differ in one bit, or in their zeros, have other hashes") {
  std::vector<std::byte> bytes(100);
  std::set<std::uint64_t> hashes{detail::content_hash(bytes)};
  for (std::size_t bit = 0; bit < 800; ++bit) {
    bytes[bit / 8] ^= std::byte(1 << bit % 8);
    hashes.insert(detail::content_hash(bytes));
    bytes[bit / 8] ^= std::byte(1 << bit % 8);
  }
  for (std::size_t size = 0; size < 100; ++size) hashes.insert(detail::content_hash(std::span(bytes).first(size)));
  for (std::size_t i = 3; i + 4 < 100; i += 4) {  // the signs of two floats
    bytes[i] ^= std::byte(0x80);
    bytes[i + 4] ^= std::byte(0x80);
    hashes.insert(detail::content_hash(bytes));
    bytes[i] = bytes[i + 4] = {};
  }
  CHECK(hashes.size() == 1 + 800 + 100 + 24);
  CHECK(detail::content_hash(bytes, 1) != detail::content_hash(bytes));
}

TEST_CASE("sharded_safetensors: a program killed at any moment leaves all of the old or all of the new") {
  const std::uint64_t layouts[] = {0, 120, 80};  // one file, three shards, four
  for (const std::uint64_t old : layouts)
    for (const std::uint64_t wanted : layouts) {
      CAPTURE(old);
      CAPTURE(wanted);
      int moments = 0, kept = 0;
      for (bool finished = false; !finished; ++moments) {
        CAPTURE(moments);
        const TemporaryFolder folder;
        write(folder.path, 1, old);
        const int status = status_of(start([&] {
          changes_left = moments;
          write(folder.path, 2, wanted);
          ::_exit(0);
        }));
        REQUIRE(WIFEXITED(status));
        finished = WEXITSTATUS(status) == 0;
        const float mark = mark_of(folder.path);
        CHECK((mark == 2 || (!finished && mark == 1)));
        kept += mark == 1;
        if (moments % 2) {  // the next one is killed too
          status_of(start([&] {
            changes_left = moments / 2;
            write(folder.path, 4, old);
          }));
          CHECK((mark_of(folder.path) == mark || mark_of(folder.path) == 4));
        }
        write(folder.path, 3, 120);
        CHECK(mark_of(folder.path) == 3);
        CHECK(files_in(folder.path) == three_shards);
      }
      CHECK(kept >= 4);
      CHECK(moments >= kept + 4);
    }
}

TEST_CASE("sharded_safetensors: killed while it writes, it leaves files that the next one removes") {
  for (const std::uint64_t limit : {0, 120}) {
    const TemporaryFolder folder;
    write(folder.path, 1, 120);
    status_of(start([&] {
      auto sources = sources_of(values_of(2));
      sources[3].bytes = []() -> std::span<const std::byte> { ::_exit(1); };
      write_sharded_safetensors(folder.path, sources, {}, limit, {{"config.json", "2"}});
    }));
    CHECK(files_in(folder.path).size() > three_shards.size());
    CHECK(mark_of(folder.path) == 1);
    write(folder.path, 3, limit);
    CHECK(mark_of(folder.path) == 3);
    CHECK(files_in(folder.path) == (limit ? three_shards : whole));
  }
}

TEST_CASE("sharded_safetensors: where writing fails, the old files stay and nothing beside them") {
  for (const std::uint64_t limit : {0, 120}) {
    const TemporaryFolder folder;
    write(folder.path, 1, 120);
    auto sources = sources_of(values_of(2));
    sources[3].bytes = []() -> std::span<const std::byte> { throw std::runtime_error("the cause"); };
    const std::string message = message_of([&] {
      write_sharded_safetensors(folder.path, sources, {}, limit, {{"config.json", "2"}});
    });
    CHECK(contains(message, "cannot write"));
    CHECK(contains(message, "the cause"));
    CHECK(mark_of(folder.path) == 1);
    CHECK(files_in(folder.path) == three_shards);
  }
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder.path / index_name);
  CHECK(contains(message_of([&] { write(folder.path, 1, 120); }), "wanted a regular file to replace, came a folder"));
  std::filesystem::remove(folder.path / index_name);
  REQUIRE(::mkfifo((folder.path / "config.json").c_str(), 0600) == 0);
  CHECK(contains(message_of([&] { write(folder.path, 1, 0); }), "wanted a regular file to replace, came a pipe"));
  CHECK(files_in(folder.path) == std::set<std::string>{"config.json"});
  CHECK(contains(message_of([&] {
                   write_sharded_safetensors(folder.path, sources_of(values_of(1)), {}, 0, {{"../x.json", ""}});
                 }),
                 "wanted the name of a file in"));
}

TEST_CASE("sharded_safetensors: readers meet one writer's tensors and text, in hundreds of loads") {
  constexpr std::uint64_t limits[][2] = {{120, 120}, {120, 80}, {0, 120}, {80, 0}, {0, 0}};
  for (const auto& limit : limits) {
    const std::uint64_t first = limit[0], second = limit[1];  // clang 14 captures no structured bindings
    CAPTURE(first);
    CAPTURE(second);
    const TemporaryFolder folder;
    write(folder.path, 1, first);
    const pid_t writer = start([&, first = first, second = second] {
      for (;;) {
        write(folder.path, 2, second);
        write(folder.path, 1, first);
      }
    });
    int mixed = 0, changes = 0, loads = 0;
    float before = 1;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (loads < 400 || (changes < 20 && std::chrono::steady_clock::now() < end)) {
      float mark = 0;
      REQUIRE_NOTHROW(mark = mark_of(folder.path));
      mixed += mark != 1 && mark != 2;
      changes += mark != std::exchange(before, mark);
      ++loads;
    }
    CHECK(mixed == 0);
    CHECK(changes >= 20);
    ::kill(writer, SIGKILL);
    status_of(writer);
    CHECK((mark_of(folder.path) == 1 || mark_of(folder.path) == 2));
    write(folder.path, 3, 120);
    CHECK(mark_of(folder.path) == 3);
    CHECK(files_in(folder.path) == three_shards);
  }
}

TEST_CASE("sharded_safetensors: several writers of one folder take turns") {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  std::vector<pid_t> writers;
  for (int i = 0; i < 3; ++i)
    writers.push_back(start([&, i] {
      for (int time = 0; time < 30; ++time)
        write(folder.path, static_cast<float>(10 * i + time % 10), i == 2 ? 0 : i == 1 ? 80 : 120);
    }));
  std::thread own([&] {
    for (int time = 0; time < 30; ++time) write(folder.path, 40, 120);
  });
  int mixed = 0;
  for (int i = 0; i < 300; ++i) mixed += !(mark_of(folder.path) >= 0);
  own.join();
  for (const pid_t writer : writers) CHECK(status_of(writer) == 0);
  CHECK(mixed == 0);
  CHECK(mark_of(folder.path) >= 0);
  write(folder.path, 3, 120);
  CHECK(files_in(folder.path) == three_shards);
}

TEST_CASE("sharded_safetensors: a writer waits for one that is at work, and takes nothing from it") {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  int begun[2], go_on[2];
  REQUIRE((::pipe(begun) == 0 && ::pipe(go_on) == 0));
  const pid_t slow = start([&] {
    auto sources = sources_of(values_of(2));
    sources[3].bytes = [&, bytes = sources[3].bytes] {
      char c = 0;
      if (::write(begun[1], &c, 1) != 1 || ::read(go_on[0], &c, 1) != 1) ::_exit(3);
      return bytes();
    };
    write_sharded_safetensors(folder.path, sources, {}, 120, {{"config.json", std::to_string(2.f)}});
  });
  char c = 0;
  REQUIRE(::read(begun[0], &c, 1) == 1);
  const pid_t next = start([&] { write(folder.path, 5, 80); });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  int status = 0;
  CHECK(::waitpid(next, &status, WNOHANG) == 0);
  CHECK(mark_of(folder.path) == 1);
  REQUIRE(::write(go_on[1], &c, 1) == 1);
  CHECK(status_of(slow) == 0);
  CHECK(status_of(next) == 0);
  CHECK(mark_of(folder.path) == 5);
  for (const int pipe : {begun[0], begun[1], go_on[0], go_on[1]}) ::close(pipe);
}

TEST_CASE("sharded_safetensors: an index of others may name the whole file; it is replaced at one moment too") {
  const auto prepare = [](const std::filesystem::path& folder) {
    write(folder, 1, 120);
    json index = json::parse(read_text(folder / index_name));
    std::filesystem::rename(folder / shard(folder, 1), folder / "model.safetensors");
    std::filesystem::rename(folder / shard(folder, 2), folder / "model-00002-of-00003.safetensors");
    index["weight_map"]["a"] = index["weight_map"]["b"] = "model.safetensors";
    index["weight_map"]["c"] = "model-00002-of-00003.safetensors";
    index["metadata"].erase("config.json");
    write_text(folder / index_name, index.dump());
  };
  for (int moment = 0, finished = 0; !finished; ++moment) {
    const TemporaryFolder folder;
    prepare(folder.path);
    REQUIRE(mark_of(folder.path) == 1);
    finished = status_of(start([&] {
                 changes_left = moment;
                 write(folder.path, 2, 0);
               })) == 0;
    const float mark = mark_of(folder.path);
    CHECK((mark == 2 || (!finished && mark == 1)));
    for (const float next : {3.f, 4.f}) write(folder.path, next, 0);  // the first leaves an index, of one shard
    CHECK(mark_of(folder.path) == 4);
    CHECK(files_in(folder.path) == whole);
  }
}

TEST_CASE("sharded_safetensors: a text that a user edits counts, and other texts may be missing") {
  const TemporaryFolder folder;
  for (const std::uint64_t limit : {0, 120}) {
    write(folder.path, 1, limit);
    write_text(folder.path / "config.json", "edited");
    const auto files = ShardedSafetensors::open(folder.path, {"config.json", "generation_config.json"});
    REQUIRE(files.text("config.json"));
    CHECK(*files.text("config.json") == "edited");
    CHECK(files.text("generation_config.json") == nullptr);
  }
  CHECK(contains(message_of([&] { ShardedSafetensors::open(folder.path / "none", {"config.json"}); }),
                 "model.safetensors': No such file or directory"));
}

TEST_CASE("sharded_safetensors: an index and shards that do not fit each other") {
  CHECK(refusal([](json&) {}) == "");
  CHECK(refusal([](json& index) { index.erase("metadata"); }) == "");
  const auto map = [](const char* tensor, const json& file) {
    return [=](json& index) { index["weight_map"][tensor] = file; };
  };
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  const std::string first = shard(folder.path, 1), second = shard(folder.path, 2), third = shard(folder.path, 3);

  CHECK(contains(refusal(map("c", "lost.safetensors")), "shard 'lost.safetensors' is missing"));
  CHECK(contains(refusal([](json&) {}, [&](const auto& folder) { std::filesystem::remove(folder / second); }),
                 "shard '" + second + "' is missing"));
  CHECK(contains(refusal(map("f", second)), "'f' is not in its shard '" + second + "'"));
  const std::string moved = refusal(map("d", second));
  CHECK(contains(moved, "shard '" + third + "' holds 'd', which the index has in '" + second + "'"));
  CHECK(contains(refusal([](json& index) { index["weight_map"].erase("e"); }),
                 "shard '" + third + "' holds 'e', which the index lacks"));
  CHECK(contains(refusal([](json&) {},
                         [&](const auto& folder) {
                           HeldTensors held(folder / second);
                           held.add_copy("c", "d");
                           held.write(folder / second);
                         }),
                 "tensor 'd' is in another file of this checkpoint too"));
  const std::string several = refusal([&](json& index) {
    index["weight_map"].erase("a");
    index["weight_map"].erase("e");
    index["weight_map"]["x"] = first;
  });
  CHECK(std::count(several.begin(), several.end(), '\n') == 3);
  CHECK(contains(refusal([](json&) {}, [&](const auto& folder) { write_text(folder / second, "short"); }),
                 "a safetensors file has at least 8 bytes"));
}

TEST_CASE("sharded_safetensors: a shard is a file of the folder itself") {
  for (const char* name : {"../x.safetensors", "/tmp/x.safetensors", "x/y.safetensors", "x\\y.safetensors", "..", "",
                           "x.bin", "x\n.safetensors", "./model-00001-of-00003.safetensors"}) {
    CAPTURE(name);
    CHECK(contains(refusal([&](json& index) { index["weight_map"]["a"] = name; }),
                   "'a': wanted the name of a .safetensors file in this folder, came '"));
  }
  CHECK(contains(refusal([](json& index) { index["weight_map"]["a"] = std::string("x\0.safetensors", 14); }),
                 "wanted the name of a .safetensors file"));
}

TEST_CASE("sharded_safetensors: broken and hostile indices") {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  const auto refused = [&](const std::string& text) {
    write_text(folder.path / index_name, text);
    return message_of([&] { read(folder.path); });
  };
  CHECK(contains(refused(""), "not valid JSON"));
  CHECK(contains(refused("[]"), "wanted a JSON object, came array"));
  CHECK(contains(refused("{}"), "weight_map must be an object, came none"));
  CHECK(contains(refused(R"({"weight_map": []})"), "weight_map must be an object, came array"));
  CHECK(contains(refused(R"({"weight_map": {}})"), "weight_map names no tensor"));
  CHECK(contains(refused(R"({"weight_map": {"a": 1, "b": null}})"), "'a': wanted the name of a .safetensors file"));
  CHECK(contains(refused(R"({"weight_map": {"a": "x.safetensors"}, "metadata": 1})"), "metadata must be an object"));
  CHECK(contains(refused(R"({"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": "1"}})"),
                 "total_size must be a number, came \"1\""));
  CHECK(contains(refused(R"({"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}})"), "key 'a' occurs twice"));
  CHECK(contains(refused("{\"weight_map\": {}}" + std::string(1, '\0')), "zero byte"));
  CHECK(contains(refused("{\"weight_map\": " + std::string(1'000'000, '[')), "nested deeper"));
  CHECK(contains(refused(std::string(std::size_t{20} << 20, ' ')), "bytes are allowed"));
  std::string many = R"({"weight_map": {"a": 1)";
  for (int i = 0; i < 5000; ++i) many += ",\"" + std::to_string(i) + "\": 1";
  CHECK(contains(refused(many + "}}"), "and 4001 more"));
  std::filesystem::remove(folder.path / index_name);
  std::filesystem::create_directory(folder.path / index_name);
  CHECK(contains(message_of([&] { read(folder.path); }), "wanted a regular file, came a folder"));
}

TEST_CASE("sharded_safetensors: 20,000 mutated indices") {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  const std::string original = read_text(folder.path / index_name);
  const std::string pieces[] = {
      "../",  "/",  "{",       "}",   "[",    "]",  "\"",      ",",
      ":",    "0",  "-1",      "1e9", "null", "\\", "\"a\":1", "model-00002-of-00003.safetensors",
      "\xff", "\n", "\\u0000", "d",   "e"};
  Random random(Seed{12});
  int accepted = 0, refused = 0, unclear = 0, wrong = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = original;
    for (Index edits = 1 + random.below(3); edits > 0 && !text.empty(); --edits) {
      const auto at = static_cast<std::size_t>(random.below(static_cast<Index>(text.size())));
      const auto& piece = pieces[static_cast<std::size_t>(random.below(static_cast<Index>(std::size(pieces))))];
      switch (random.below(4)) {
        case 0:
          text.insert(at, piece);
          break;
        case 1:
          text.erase(at, static_cast<std::size_t>(1 + random.below(40)));
          break;
        case 2:
          text[at] = static_cast<char>(random.below(256));
          break;
        default:
          text.insert(at, text.substr(static_cast<std::size_t>(random.below(static_cast<Index>(text.size()))),
                                      static_cast<std::size_t>(random.below(60))));
      }
    }
    write_text(folder.path / index_name, text);
    Values values;
    const std::string message = message_of([&] { values = read(folder.path); });
    wrong += message.empty() && values != values_of(1);
    ++(message.empty() ? accepted : refused);
    unclear += !message.empty() && !contains(message, folder.path.string());
  }
  CHECK(unclear == 0);
  CHECK(wrong == 0);
  CHECK(accepted > 200);  // spaces, and the total
  CHECK(refused > 10'000);
}
