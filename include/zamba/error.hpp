// SPDX-License-Identifier: MIT
// The one exception type of the library.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace zamba {

/// What every run-time check throws. The message names the thing, what was wanted and what came.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws Error with the parts written one after the other, as by operator<<.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "zamba: ";
  (message << ... << parts);
  throw Error(message.str());
}

/// fail(parts...) unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

}  // namespace zamba
