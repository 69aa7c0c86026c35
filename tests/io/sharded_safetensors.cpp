// SPDX-License-Identifier: MIT
// Shards and their index: what is written, read and refused, and what a machine that stops while writing leaves.
#include <zamba/io/sharded_safetensors.hpp>

#include <cstdlib>
#include <functional>

#include <doctest/doctest.h>
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
bool links_fail = false;

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
int link(const char* path, const char* other) noexcept {
  before_change();
  if (links_fail) {
    errno = EPERM;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, other, 0));
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

/// With 120 bytes: a and b, c, d and e.
void write(const std::filesystem::path& folder, float mark, std::uint64_t max_shard_bytes) {
  write_sharded_safetensors(folder, sources_of(values_of(mark)), {{"format", "pt"}}, max_shard_bytes);
}

Values read(const std::filesystem::path& folder) {
  const auto file = ShardedSafetensors::open(folder);
  Values values;
  for (const std::string& name : file.names()) values[name] = read_values<float>(*file.find(name));
  return values;
}

std::set<std::string> files_in(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(folder)) names.insert(file.path().filename().string());
  return names;
}

const std::set<std::string> three_shards{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                         "model-00003-of-00003.safetensors", index_name};

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
  CHECK(index["weight_map"]["b"] == "model-00001-of-00003.safetensors");
  CHECK(index["weight_map"]["c"] == "model-00002-of-00003.safetensors");
  CHECK(index["weight_map"]["e"] == "model-00003-of-00003.safetensors");
  CHECK(read(folder.path) == values_of(1));

  write(folder.path, 2, 1);  // each is larger than that
  CHECK(files_in(folder.path).size() == 6);
  CHECK(read(folder.path) == values_of(2));
  write(folder.path, 3, 62 * sizeof(float));  // all fit
  CHECK(files_in(folder.path) == std::set<std::string>{"model.safetensors"});
  CHECK(read(folder.path) == values_of(3));
  write(folder.path, 4, std::uint64_t(-1));
  CHECK(read(folder.path) == values_of(4));
}

TEST_CASE("sharded_safetensors: equal tensors give equal bytes, whatever was there before") {
  const TemporaryFolder first, second;
  write(first.path, 1, 120);
  write(second.path, 7, 120);
  write_text(second.path / "tokenizer.json", "{}");
  write(second.path, 1, 120);
  CHECK(read_text(second.path / "tokenizer.json") == "{}");
  for (const std::string& name : three_shards) CHECK(read_text(first.path / name) == read_text(second.path / name));
  CHECK(files_in(second.path).size() == 5);
}

TEST_CASE("sharded_safetensors: a program killed at any moment leaves the old tensors or the new ones") {
  const std::uint64_t layouts[] = {0, 120, 80};  // one file, three shards, four
  for (const std::uint64_t old : layouts)
    for (const std::uint64_t wanted : layouts) {
      CAPTURE(old);
      CAPTURE(wanted);
      int moments = 0;
      for (bool finished = false; !finished; ++moments) {
        CAPTURE(moments);
        const TemporaryFolder folder;
        write(folder.path, 1, old);
        const pid_t child = ::fork();
        REQUIRE(child >= 0);
        if (child == 0) {
          changes_left = moments;
          write(folder.path, 2, wanted);
          ::_exit(0);
        }
        int status = 0;
        REQUIRE(::waitpid(child, &status, 0) == child);
        REQUIRE(WIFEXITED(status));
        finished = WEXITSTATUS(status) == 0;
        const Values values = read(folder.path);
        CHECK((values == values_of(2) || (!finished && values == values_of(1))));
        write(folder.path, 3, wanted);  // what was left does not disturb the next one
        CHECK(read(folder.path) == values_of(3));
        for (const std::string& name : files_in(folder.path)) CHECK_FALSE(name.starts_with("previous-"));
      }
      CHECK(moments >= (wanted == 0 ? 2 : 5));
      if (old == wanted && old > 0) CHECK(moments >= 10);  // the old shards get other names first
    }
}

TEST_CASE("sharded_safetensors: an index and shards that do not fit each other") {
  CHECK(refusal([](json&) {}) == "");
  CHECK(refusal([](json& index) { index.erase("metadata"); }) == "");
  const auto map = [](const char* tensor, const json& file) {
    return [=](json& index) { index["weight_map"][tensor] = file; };
  };
  const std::string second = "model-00002-of-00003.safetensors", third = "model-00003-of-00003.safetensors";

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
  const std::string several = refusal([](json& index) {
    index["weight_map"].erase("a");
    index["weight_map"].erase("e");
    index["weight_map"]["x"] = "model-00001-of-00003.safetensors";
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

TEST_CASE("sharded_safetensors: without links, old shards are copied") {
  const TemporaryFolder folder;
  write(folder.path, 1, 120);
  links_fail = true;
  detail::set_aside(folder.path, three_shards);
  links_fail = false;
  CHECK(read(folder.path) == values_of(1));
  CHECK(files_in(folder.path).size() == 7);
  write(folder.path, 2, 120);
  CHECK(files_in(folder.path) == three_shards);
}
