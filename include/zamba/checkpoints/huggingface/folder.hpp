// SPDX-License-Identifier: MIT
// What a folder holds that is no checkpoint in the Hugging Face layout, in one sentence.
#pragma once

#include <algorithm>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/io/sharded_safetensors.hpp>

namespace zamba::detail {

/// The first name of a file in a folder for which `wanted` holds, in the order of names; empty where there is none.
template <class Wanted>
std::string first_file(const std::filesystem::path& directory, Wanted&& wanted) {
  std::error_code error;
  std::string first;
  for (std::filesystem::directory_iterator file(directory, error), end; !error && file != end; file.increment(error)) {
    const std::string name = file->path().filename().string();
    if (wanted(std::string_view(name)) && (first.empty() || name < first)) first = name;
  }
  return first;
}

/// Throws where there is no config.json, but that of something else.
inline void check_has_config(const std::filesystem::path& directory) {
  if (is_there(directory / "config.json")) return;
  require(!is_there(directory / "adapter_config.json"), "'", directory.string(),
          "' holds an adapter (adapter_config.json) and no model: merge it into its model first");
  require(!is_there(directory / "params.json"), "'", directory.string(),
          "' is of the original format of Meta or Mistral (params.json), not of Hugging Face's: take the repository of "
          "that, or convert it by transformers");
}

/// Throws where weights are there, but not as model.safetensors or in shards with an index.
inline void check_has_safetensors(const std::filesystem::path& directory) {
  if (is_there(directory / whole_file) || is_there(directory / index_file)) return;
  const std::string pickled = first_file(directory, [](std::string_view name) {
    const bool of_weights =
        name.starts_with("pytorch_model") || name.starts_with("model") || name.starts_with("consolidated");
    return of_weights && (name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth"));
  });
  require(pickled.empty(), "'", directory.string(), "' holds its weights as ", quote(pickled),
          ", a pickle of PyTorch's, and only safetensors are read: load it in transformers and save it again by "
          "save_pretrained");
  const std::string other = first_file(directory, [](std::string_view name) { return name.ends_with(".safetensors"); });
  require(other.empty(), "'", directory.string(), "' holds ", quote(other), ", but neither ", whole_file, " nor ",
          index_file, ", which says what is in which file");
}

}  // namespace zamba::detail
