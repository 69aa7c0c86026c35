// SPDX-License-Identifier: MIT
// Every key of config.json that transformers knows or that docs/checkpoints.md lists, family by family: what the page
// says of it is what happens. tests/data/config_keys.json holds the keys and defaults of transformers
// (tests/interop/config_keys.py).
#include <algorithm>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include <doctest/doctest.h>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>

#include <tests/support/cases.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

/// The words of a row of the page by family: "compared", "kept", "only ...", "storage", or nothing.
using Rows = std::map<std::string, std::map<std::string, std::string>>;

std::vector<std::string> cells(const std::string& row) {
  std::vector<std::string> parts;
  std::istringstream text(row.substr(1));
  for (std::string part; std::getline(text, part, '|');) {
    const auto first = part.find_first_not_of(' '), last = part.find_last_not_of(' ');
    parts.push_back(first == part.npos ? "" : part.substr(first, last - first + 1));
  }
  return parts;
}

const Rows& rows_of_page() {
  static const Rows all = [] {
    Rows rows;
    std::ifstream page(case_path("../../docs/checkpoints.md"));
    REQUIRE(page.good());
    std::vector<std::string> families;
    for (std::string line; std::getline(page, line);) {
      if (!line.starts_with("| ")) continue;
      const auto parts = cells(line);
      if (parts[0] == "key") families = {parts.begin() + 1, parts.begin() + 6};
      if (families.empty() || !parts[0].starts_with('`')) continue;
      if (parts.size() < 6) break;  // another table
      for (std::size_t i = 0; i < families.size(); ++i)
        rows[parts[0].substr(1, parts[0].size() - 2)][families[i]] = parts[i + 1];
    }
    return rows;
  }();
  return all;
}

bool is_read(const std::string& words) { return words == "compared" || words.starts_with("only "); }

/// Another value of the kind.
json changed(const std::string& key, const json& value) {
  if (key == "rope_parameters" || key == "rope_scaling") return {{"rope_type", "yarn"}, {"factor", 2.0}};
  if (key == "time_step_limit") return {0.001, 0.1};
  if (key.ends_with("_token_id")) return json::array({3, 5});
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number_integer()) return value.get<Index>() + 1;
  if (value.is_number()) return value.get<double>() * 3 + 0.5;
  if (value.is_string()) return "other";
  if (value.is_array()) return json::array({"hybrid"});
  if (value.is_object()) return {{"0", "another"}};
  return 7;
}

template <class Net>
class Family {
 public:
  /// name: of the case; column: of the page's table; keys: of transformers.
  Family(const std::string& name, std::string column, const std::string& keys) : column_(std::move(column)) {
    config_ = json::parse(read_text(case_path(name) / "config.json"));
    known_ = json::parse(read_text(case_path("config_keys.json")))[keys];
    for (const ConfigKey& key : CheckpointFormat<Net>::layout(detail::list_parameters<Net, float>()).config) {
      read_.insert(key.key);
      read_.insert(key.spellings.begin(), key.spellings.end());
    }
    if (keys == "mistral") config_.update({{"model_type", "mistral"}, {"sliding_window", nullptr}});
    REQUIRE(refusal(json::object()) == "");
  }

  void check() {
    for (const auto& item : known_.items()) {
      const std::string key = item.key();  // clang 14 captures no structured bindings
      CAPTURE(key);
      REQUIRE(rows_of_page().contains(key));
      CHECK(rows_of_page().at(key).at(column_) != "");
    }
    for (const auto& row : rows_of_page())
      if (const std::string& words = row.second.at(column_); words != "") {
        const std::string& key = row.first;
        CAPTURE(key);
        const json now = config_.value(key, known_.value(key, json()));
        const json other = changed(key, now.is_null() ? known_.value(key, json()) : now);
        if (is_read(words))
          check_read(key, other);
        else
          kept_[key] = other;
      }
    for (const std::string& key : read_) {
      CAPTURE(key);
      REQUIRE(rows_of_page().contains(key));
      CHECK(is_read(rows_of_page().at(key).at(column_)));
    }
  }

  /// What was kept, loaded and saved: keys in no row, too, and eos ids as a list.
  void check_kept(const std::string& name) {
    kept_["a_key_of_no_program"] = {{"nested", {1, nullptr, "text"}}};
    for (const char* key : {"dtype", "torch_dtype"}) kept_[key] = "bfloat16";
    const CaseCopy copy(name);
    json config = config_;
    config.update(kept_);
    write_text(copy.path() / "config.json", config.dump());
    const TemporaryFolder folder;
    const auto model = load_huggingface<Net, double>(copy.path());
    CHECK(token_ids(model.checkpoint_config(), "eos_token_id") == std::vector<Token>{3, 5});
    save_huggingface(model.template to<float>(), folder.path);
    config["dtype"] = config["torch_dtype"] = "float32";
    CHECK(json::parse(read_text(folder.path / "config.json")) == config);
  }

  /// Absent keys mean the defaults of transformers, where those follow from no other key.
  void check_absent() {
    std::istringstream lines(refusal_of({{"model_type", config_["model_type"]}}));
    const std::set<std::string> derived{"layers_block_type", "rope_parameters",   "time_step_rank",
                                        "mamba_dt_rank",     "intermediate_size", "num_key_value_heads"};
    int count = 0;
    for (std::string line; std::getline(lines, line);) {
      const std::string means = "the file none, which means ";
      const auto at = line.find(means);
      if (at == line.npos) continue;
      const std::string key = line.substr(2, line.find(':') - 2);
      CAPTURE(line);
      if (derived.contains(key) && known_["model_type"] != "mistral") continue;
      const std::string value = line.substr(at + means.size());
      CHECK(json::parse(value.substr(0, value.find(';'))) == known_[key]);
      ++count;
    }
    CHECK(count >= 3);
  }

 private:
  std::string refusal_of(const json& config) const {
    return message_of([&] { check_config<Net>(config.dump()); });
  }
  std::string refusal(const json& changes) const {
    json config = config_;
    config.update(changes);
    return refusal_of(config);
  }

  void check_read(const std::string& key, const json& other) const {
    CHECK(read_.contains(key));
    json changes{{key, other}};
    if (key == "rope_theta") changes["rope_parameters"] = nullptr;
    const std::string message = refusal(changes);
    CAPTURE(message);
    CHECK(contains(message, "\n  " + key + ": the type has "));
    const auto line = message.substr(std::min(message.find("\n  " + key + ": "), message.size()));
    // Of lists and objects the message may show what they stand for.
    const std::string file = key.starts_with("rope_") && other.is_object() ? "\"yarn\"" : detail::value_text(other);
    if (key != "layers_block_type" && key != "layer_types") CHECK(contains(line, ", the file " + file));
  }

  std::string column_;
  json config_, known_, kept_;
  std::set<std::string> read_;
};

template <class Net>
void check_family(const std::string& name, const std::string& column, const std::string& keys) {
  Family<Net> family(name, column, keys);
  family.check();
  family.check_absent();
  family.check_kept(name);
}

}  // namespace

TEST_CASE("config_keys: zamba") { check_family<ZambaCase>("zamba", "zamba", "zamba"); }
TEST_CASE("config_keys: zamba2") { check_family<Zamba2TwoBlocksCase>("zamba2-two-blocks", "zamba2", "zamba2"); }
TEST_CASE("config_keys: mamba") { check_family<MambaCase>("mamba", "mamba", "mamba"); }
TEST_CASE("config_keys: mamba2") { check_family<Mamba2GroupsCase>("mamba2-groups", "mamba2", "mamba2"); }
TEST_CASE("config_keys: llama") { check_family<LlamaCase>("llama", "llama", "llama"); }
TEST_CASE("config_keys: mistral") { check_family<LlamaCase>("llama", "llama", "mistral"); }

TEST_CASE("config_keys: ids of tokens") {
  CHECK(token_ids("", "eos_token_id").empty());
  CHECK(token_ids("{}", "eos_token_id").empty());
  CHECK(token_ids(R"({"eos_token_id": null})", "eos_token_id").empty());
  CHECK(token_ids(R"({"eos_token_id": 7})", "eos_token_id") == std::vector<Token>{7});
  CHECK(token_ids(R"({"eos_token_id": [128001, 128009]})", "eos_token_id") == std::vector<Token>{128001, 128009});
  CHECK(token_ids(R"({"pad_token_id": -1})", "pad_token_id").empty());
  for (const char* wrong : {R"({"e": "7"})", R"({"e": 7.5})", R"({"e": [1, null]})", R"({"e": 2147483648})"})
    CHECK(contains(message_of([&] { token_ids(wrong, "e"); }), "config.json: e: wanted token ids, came "));
}
