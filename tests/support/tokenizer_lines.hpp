// SPDX-License-Identifier: MIT
// The lines of tests/data/tokenizer/ and what others make of them, as tests/interop/tokenizer.py wrote them.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/io/safetensors.hpp>

namespace zamba_test {

inline std::filesystem::path tokenizer_data(const std::string& file) {
  return std::filesystem::path(ZAMBA_TEST_DATA) / "tokenizer" / file;
}

/// A list of lists: one tensor of all values, one of the lengths.
template <class List>
std::vector<List> tokenizer_lists(const std::string& name) {
  static const auto file = zamba::Safetensors::open(tokenizer_data("lines.safetensors"));
  const auto values = zamba::read_values<zamba::Token>(*file.find(name));
  std::vector<List> lists;
  std::ptrdiff_t at = 0;
  for (const zamba::Index length : zamba::read_values<zamba::Index>(*file.find(name + ".lengths"))) {
    lists.emplace_back(values.begin() + at, values.begin() + at + length);
    at += length;
  }
  return lists;
}

inline std::vector<std::string> tokenizer_lines() { return tokenizer_lists<std::string>("lines"); }
inline std::vector<std::vector<zamba::Token>> tokenizer_ids(const std::string& name) {
  return tokenizer_lists<std::vector<zamba::Token>>(name);
}

}  // namespace zamba_test
