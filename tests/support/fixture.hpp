// SPDX-License-Identifier: MIT
// Fixture: the tensors of a file in tests/data, as doubles. A reader for well-formed test files only; what users load
// checkpoints with is <zamba/io/safetensors.hpp>.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/device.hpp>
#include <zamba/error.hpp>

namespace zamba::testing {

class Fixture {
 public:
  /// The file under ZAMBA_TEST_DATA with the given name.
  explicit Fixture(const std::string& name) {
    const std::string path = std::string(ZAMBA_TEST_DATA) + "/" + name;
    std::ifstream file(path, std::ios::binary);
    require(file.good(), "Fixture: cannot open ", path);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    std::uint64_t header = 0;
    require(bytes_.size() > sizeof(header), "Fixture: ", path, " is too short");
    std::memcpy(&header, bytes_.data(), sizeof(header));
    data_ = sizeof(header) + header;
    require(data_ <= bytes_.size(), "Fixture: ", path, " is shorter than its header says");
    header_ = nlohmann::json::parse(bytes_.begin() + sizeof(header), bytes_.begin() + static_cast<Index>(data_));
  }

  /// operators.safetensors: single operators with inputs, outputs, cotangents and gradients.
  static const Fixture& operators() {
    static const Fixture fixture("operators.safetensors");
    return fixture;
  }

  /// The elements of an F32 or I64 tensor, row-major.
  std::vector<double> values(const std::string& name) const {
    const auto& entry = find(name);
    const std::size_t begin = entry.at("data_offsets").at(0), end = entry.at("data_offsets").at(1);
    require(begin <= end && data_ + end <= bytes_.size(), "Fixture: ", name, " lies outside the file");
    const char* from = bytes_.data() + data_ + begin;
    const std::string type = entry.at("dtype");
    if (type == "F32") return converted<float>(from, end - begin);
    if (type == "I64") return converted<std::int64_t>(from, end - begin);
    fail("Fixture: ", name, " has type ", type, ", wanted F32 or I64");
  }

  std::vector<Index> shape(const std::string& name) const { return find(name).at("shape").get<std::vector<Index>>(); }

 private:
  const nlohmann::json& find(const std::string& name) const {
    const auto entry = header_.find(name);
    require(entry != header_.end(), "Fixture: no tensor ", name);
    return *entry;
  }

  template <class T>
  static std::vector<double> converted(const char* from, std::size_t bytes) {
    std::vector<T> raw(bytes / sizeof(T));
    if (!raw.empty()) std::memcpy(raw.data(), from, raw.size() * sizeof(T));
    return {raw.begin(), raw.end()};
  }

  std::vector<char> bytes_;
  std::size_t data_ = 0;
  nlohmann::json header_;
};

}  // namespace zamba::testing
