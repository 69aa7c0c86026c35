// SPDX-License-Identifier: MIT
// Counts allocations of the whole process, and lets them fail. To be included by one file of a program: it replaces
// malloc and its relatives, through which operator new, Eigen and the OpenMP runtime all go. Under sanitizers, which
// replace them too, operator new alone is counted.
#pragma once

#include <cerrno>
#include <cstdlib>
#include <new>

#include <zamba/testing/sanitized.hpp>

#include "allocation_count.hpp"

#if defined(__GLIBC__) && !defined(ZAMBA_TEST_SANITIZED)

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

static void* no_memory() {
  errno = ENOMEM;
  return nullptr;
}

void* malloc(std::size_t size) { return zamba_test::may_allocate() ? __libc_malloc(size) : no_memory(); }
void* calloc(std::size_t count, std::size_t size) {
  return zamba_test::may_allocate() ? __libc_calloc(count, size) : no_memory();
}
void* realloc(void* pointer, std::size_t size) {
  return zamba_test::may_allocate() ? __libc_realloc(pointer, size) : no_memory();
}
void* memalign(std::size_t alignment, std::size_t size) {
  return zamba_test::may_allocate() ? __libc_memalign(alignment, size) : no_memory();
}
void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }
int posix_memalign(void** pointer, std::size_t alignment, std::size_t size) {
  *pointer = memalign(alignment, size);
  return *pointer ? 0 : ENOMEM;
}
}

#else

void* operator new(std::size_t size) {
  if (void* pointer = zamba_test::may_allocate() ? std::malloc(size ? size : 1) : nullptr) return pointer;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  void* pointer = nullptr;
  if (zamba_test::may_allocate() && posix_memalign(&pointer, static_cast<std::size_t>(alignment), size ? size : 1) == 0)
    return pointer;
  throw std::bad_alloc();
}
// A sanitizer keeps these two to itself, and would not let the delete below release what they gave.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return zamba_test::may_allocate() ? std::malloc(size ? size : 1) : nullptr;
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  void* pointer = nullptr;
  return zamba_test::may_allocate() &&
                 posix_memalign(&pointer, static_cast<std::size_t>(alignment), size ? size : 1) == 0
             ? pointer
             : nullptr;
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::align_val_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t, std::align_val_t) noexcept { std::free(pointer); }

#endif
