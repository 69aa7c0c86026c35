// SPDX-License-Identifier: MIT
// Buffer<Device>: owned, 64-byte aligned memory of a device. Memory<Device>: how a device allocates and copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <zamba/device.hpp>
#include <zamba/error.hpp>

namespace zamba {

/// Every view into a buffer starts at a multiple of this many bytes: a cache line, and an AVX-512 register.
inline constexpr std::size_t alignment = 64;

constexpr std::size_t align_up(std::size_t bytes) { return ceil_div(bytes, alignment) * alignment; }

namespace detail {

/// What so many elements take; throws where it is more than can be addressed.
template <class... Extents>
std::size_t checked_bytes(std::size_t element, Extents... extents) {
  std::size_t bytes = element;
  const bool fits = (!__builtin_mul_overflow(bytes, static_cast<std::size_t>(extents), &bytes) && ...);
  if (!fits || bytes >= std::size_t{1} << 62) [[unlikely]]
    fail((static_cast<double>(extents) * ... * static_cast<double>(element)), " bytes are more than can be addressed");
  return bytes;
}

}  // namespace detail

/// Allocation and copies on a device; specialised beside each device's Context. allocate throws OutOfMemory.
template <class Device>
struct Memory;

template <>
struct Memory<cpu> {
  /// Asks for huge pages, without which decode spends its time finding pages.
  static void* allocate(std::size_t bytes) {
    void* pointer = ::operator new (bytes, std::align_val_t{alignment}, std::nothrow);
    if (!pointer)
      detail::throw_error<OutOfMemory>("out of memory: ", bytes, " bytes wanted, ", free_bytes(), " are free");
#if defined(__linux__)
    constexpr std::size_t page = std::size_t{1} << 21;
    const std::size_t to_page = (page - reinterpret_cast<std::uintptr_t>(pointer) % page) % page;
    if (bytes >= to_page + page)
      ::madvise(static_cast<std::byte*>(pointer) + to_page, (bytes - to_page) / page * page, MADV_HUGEPAGE);
#endif
    return pointer;
  }
  static void release(void* pointer) noexcept { ::operator delete (pointer, std::align_val_t{alignment}); }
  /// Physical memory that nobody uses; 0 where the system does not tell.
  static std::size_t free_bytes() {
#if defined(_SC_AVPHYS_PAGES)
    return static_cast<std::size_t>(::sysconf(_SC_AVPHYS_PAGES)) * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
#else
    return 0;
#endif
  }
  static void copy_from_host(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  static void copy_to_host(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  static void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  /// `count` pieces of so many bytes, `stride` bytes apart, one after the other.
  static void copy_pieces_to_host(void* to, const void* from, std::size_t bytes, std::size_t count,
                                  std::size_t stride) {
    for (std::size_t i = 0; i < count; ++i)
      std::memcpy(static_cast<std::byte*>(to) + i * bytes, static_cast<const std::byte*>(from) + i * stride, bytes);
  }
  static void zero(void* to, std::size_t bytes) { std::memset(to, 0, bytes); }
};

/// Defined in context.cuh. Declared for every compiler, so that a translation unit of g++ or clang can own CUDA memory
/// and copy it, and leaves the calls of CUDA to the .cu it is linked with.
template <>
struct Memory<cuda> {
  static void* allocate(std::size_t bytes);
  static void release(void* pointer) noexcept;
  static std::size_t free_bytes();
  static void copy_from_host(void* to, const void* from, std::size_t bytes);
  static void copy_to_host(void* to, const void* from, std::size_t bytes);
  static void copy(void* to, const void* from, std::size_t bytes);
  static void copy_pieces_to_host(void* to, const void* from, std::size_t bytes, std::size_t count, std::size_t stride);
  static void zero(void* to, std::size_t bytes);
};

/// Uninitialised bytes on a device. Movable; copies are explicit, through clone().
template <class Device>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer();

  Buffer clone() const;
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

template <class Device>
Buffer<Device>::Buffer(std::size_t bytes)
    : data_(bytes ? static_cast<std::byte*>(Memory<Device>::allocate(bytes)) : nullptr), size_(bytes) {}

template <class Device>
Buffer<Device>::~Buffer() {
  if (data_) Memory<Device>::release(data_);
}

template <class Device>
Buffer<Device> Buffer<Device>::clone() const {
  Buffer copy(size_);
  if (size_) Memory<Device>::copy(copy.data_, data_, size_);
  return copy;
}

}  // namespace zamba
