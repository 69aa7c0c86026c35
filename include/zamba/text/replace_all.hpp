// SPDX-License-Identifier: MIT
// replace_all: a text with every occurrence of another in it replaced.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace zamba::detail {

/// Every `from` that is met from left to right as `to`; check(size) is called before the result grows to that.
template <class Check>
std::string replace_all(std::string_view text, std::string_view from, std::string_view to, Check&& check) {
  std::string result;
  std::size_t done = 0;
  for (std::size_t at = text.find(from); at != text.npos; at = text.find(from, done)) {
    check(result.size() + at - done + to.size());
    result.append(text.substr(done, at - done)).append(to);
    done = at + from.size();
  }
  return result.append(text.substr(done));
}
inline std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  return replace_all(text, from, to, [](std::size_t) {});
}

}  // namespace zamba::detail
