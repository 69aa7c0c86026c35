// SPDX-License-Identifier: MIT
// Problems: what is wrong with a file, collected for one Error.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include <zamba/error.hpp>

namespace zamba::detail {

/// A name from a file, as part of a message: bounded, and without control characters.
inline std::string quote(std::string_view name) {
  constexpr std::size_t longest = 120;
  std::string text = "'";
  text.append(name.substr(0, longest)).append(name.size() > longest ? "...'" : "'");
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, '?');
  return text;
}

/// Lines of a message: the first thousand, and how many there are beyond.
class Problems {
 public:
  void add(const std::string& problem) {
    if (++count_ <= listed) text_ += "\n  " + problem;
  }
  /// Throws one Error with all of them, if there are any.
  void check(const std::string& heading) const {
    if (count_ == 0) return;
    fail(heading, text_, count_ > listed ? "\n  and " + std::to_string(count_ - listed) + " more" : std::string());
  }

 private:
  static constexpr std::size_t listed = 1000;

  std::size_t count_ = 0;
  std::string text_;
};

}  // namespace zamba::detail
