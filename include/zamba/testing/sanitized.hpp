// SPDX-License-Identifier: MIT
// Whether a sanitizer looks on. It looks for wrong memory and undefined behaviour, which a few elements, draws or ways
// to cut a sequence show as well as all of them; that every value is right is checked where code is optimised.
#pragma once

// ZAMBA_TEST_SANITIZED: a sanitizer replaces malloc and keeps memory of its own.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define ZAMBA_TEST_SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ZAMBA_TEST_SANITIZED
#endif

namespace zamba::testing {

#ifdef ZAMBA_TEST_SANITIZED
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif

/// How many to try: `all`, or `some` under a sanitizer.
template <class N>
constexpr N unless_sanitized(N all, N some) {
  return sanitized ? some : all;
}

}  // namespace zamba::testing
