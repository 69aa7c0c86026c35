// SPDX-License-Identifier: MIT
// ZAMBA_TEST_SANITIZED: defined where a sanitizer replaces malloc and keeps memory of its own.
#pragma once

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define ZAMBA_TEST_SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ZAMBA_TEST_SANITIZED
#endif
