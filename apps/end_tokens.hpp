// SPDX-License-Identifier: MIT
// The tokens that end a text: the tokenizer's own, and every eos_token_id of generation_config.json and config.json,
// which may be an id or a list of them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include <zamba/io/file.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/json_part.hpp>

#include "text.hpp"

namespace zamba_apps {

/// The ids under eos_token_id in a file of the model's folder; none where the file or the key is not there, or null.
inline std::vector<Token> eos_token_ids(const std::filesystem::path& file, Index vocabulary) {
  if (!zamba::is_there(file)) return {};
  const std::string origin = file.string();
  const nlohmann::json object = zamba::detail::parse_object(read_text_file(file), origin);
  const zamba::detail::JsonPart part = zamba::detail::JsonPart(object, origin)["eos_token_id"];
  std::vector<Token> ids;
  const auto add = [&](const zamba::detail::JsonPart& id) {
    ids.push_back(static_cast<Token>(id.integer(vocabulary - 1)));
  };
  if (part.value().is_array())
    part.each(add);
  else if (!part.is_null())
    add(part);
  return ids;
}

/// All of them, each once.
inline std::vector<Token> end_tokens(const std::filesystem::path& folder, const Text& text, Index vocabulary) {
  std::vector<Token> ends;
  const auto add = [&](Token token) {
    if (std::find(ends.begin(), ends.end(), token) == ends.end()) ends.push_back(token);
  };
  if (text.end()) add(*text.end());
  for (const char* name : {"generation_config.json", "config.json"})
    for (const Token token : eos_token_ids(folder / name, vocabulary)) add(token);
  return ends;
}

}  // namespace zamba_apps
