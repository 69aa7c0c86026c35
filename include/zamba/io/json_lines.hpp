// SPDX-License-Identifier: MIT
// Files of JSON lines: one object a line.
#pragma once

#include <algorithm>
#include <filesystem>
#include <string>
#include <string_view>

#include <zamba/device.hpp>
#include <zamba/io/file.hpp>

namespace zamba {

/// Calls f(line, place) for every line of a file that is not blank; place is as in "items.jsonl, line 3", for messages.
/// Returns how many there were.
template <class F>
Index for_each_json_line(const std::filesystem::path& path, F&& f) {
  const MappedFile file(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  Index number = 1, count = 0;
  for (std::size_t begin = 0; begin < text.size(); ++number) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    f(line, path.string() + ", line " + std::to_string(number));
    ++count;
  }
  return count;
}

}  // namespace zamba
