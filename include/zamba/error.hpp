// SPDX-License-Identifier: MIT
// The exception type of the library, and the one case of it that a program may want to tell apart.
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

/// A device has no room for what was wanted. Nothing has changed: less may be asked for next.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

namespace detail {

template <class E, class... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::ostringstream message;
  message << "zamba: ";
  (message << ... << parts);
  throw E(message.str());
}

}  // namespace detail

/// Throws Error with the parts written one after the other, as by operator<<.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  detail::throw_error<Error>(parts...);
}

/// fail(parts...) unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

}  // namespace zamba
