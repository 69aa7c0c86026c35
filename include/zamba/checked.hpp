// SPDX-License-Identifier: MIT
// The checked build: with ZAMBA_CHECKED defined, views check positions and extents, and operators the shapes of what
// they are given, naming it. What is wrong is a zamba::Error, thrown from parallel loops too. Without the macro none of
// it is compiled.
//
// The macro is the same in all files of a program, like -march: they share templates. Views have one layout either way.
// In device code nothing is checked: a kernel can neither throw nor tell, and compute-sanitizer sees what it touches.
#pragma once

#include <exception>
#include <initializer_list>
#include <mutex>

#include <zamba/error.hpp>

#if defined(ZAMBA_CHECKED) && !defined(__CUDA_ARCH__)
/// ZAMBA_CHECK(condition, parts...): zamba::require in a checked build, nothing in others.
#define ZAMBA_CHECK(condition, ...) (static_cast<bool>(condition) ? static_cast<void>(0) : ::zamba::fail(__VA_ARGS__))
#else
#define ZAMBA_CHECK(condition, ...) static_cast<void>(0)
#endif

namespace zamba {

/// Whether this is a checked build.
#if defined(ZAMBA_CHECKED)
inline constexpr bool checked = true;
#else
inline constexpr bool checked = false;
#endif

namespace detail {

/// Keeps the first exception of tasks that run at once, which may not leave a parallel region.
class FirstException {
 public:
  template <class F>
  void keep(F&& f) noexcept {
    try {
      f();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

}  // namespace detail

}  // namespace zamba
