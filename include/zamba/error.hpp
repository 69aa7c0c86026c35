// SPDX-License-Identifier: MIT
// The exception type of the library, and the one case of it that a program may want to tell apart.
#pragma once

#include <new>
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

/// What is thrown where memory does not even suffice for a message.
inline const OutOfMemory no_memory_for_message("zamba: out of memory, with none left to say for what");

template <class E, class... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  try {
    std::ostringstream message;
    message << "zamba: ";
    (message << ... << parts);
    if (message) throw E(message.str());
  } catch (const std::bad_alloc&) {
  }
  throw no_memory_for_message;
}

/// f(), and want of memory for what it builds on the host as an OutOfMemory that names `what`.
template <class F>
decltype(auto) or_out_of_memory(const char* what, F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    throw_error<OutOfMemory>(what, ": out of memory on the host");
  }
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
