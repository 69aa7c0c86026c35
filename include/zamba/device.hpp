// SPDX-License-Identifier: MIT
// Device tags and what is known of each device, index types, and the macros in which compilers differ: one lets a
// function run on both sides, one keeps a sum as it is written. What a compiler may assume of numbers is looked at
// here, because every header includes this one.
#pragma once

#include <cstdint>

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "zamba: NaN and infinity must be told from numbers: add -fno-finite-math-only after -ffast-math or -Ofast"
#endif

#ifdef __CUDACC__
#define ZAMBA_HOST_DEVICE __host__ __device__
#else
#define ZAMBA_HOST_DEVICE
#endif

/// The value of a sum or product, which -fassociative-math may not merge with those around it. Without that flag the
/// code is the same as that of the sum: clang sees to it, and g++ defines the macro only where the flag is in force.
#if defined(__CUDACC__) && defined(__ASSOCIATIVE_MATH__)
#error "zamba: nvcc knows no way to keep a sum as it is written: add -fno-associative-math to -Xcompiler's flags"
#elif defined(__clang__) && !defined(__CUDACC__)
#define ZAMBA_AS_WRITTEN(sum) __arithmetic_fence(sum)
#elif defined(__ASSOCIATIVE_MATH__)
#define ZAMBA_AS_WRITTEN(sum) __builtin_assoc_barrier(sum)
#else
#define ZAMBA_AS_WRITTEN(sum) (sum)
#endif

namespace zamba {

/// Extents, strides and offsets. 64 bits everywhere: a Zamba-7B weight tensor times a batch exceeds 2^31 elements.
using Index = std::int64_t;

/// A token id. Negative as a target means "no loss at this position".
using Token = std::int32_t;

/// count / each, rounded up; count may not be negative.
template <class Count, class Each>
ZAMBA_HOST_DEVICE constexpr auto ceil_div(Count count, Each each) {
  return (count + each - 1) / each;
}

/// Runs through Eigen on the host.
struct cpu {};

/// Runs through the kernels of the `.cuh` files, under nvcc.
struct cuda {};

/// What is known of a device outside its operators. All of it stands beside the tags, because a unit of g++ or clang
/// that uses a model on CUDA sees no more of that device; which operators have a backward pass there is in op.hpp.
template <class Device>
struct DeviceTraits;

template <>
struct DeviceTraits<cpu> {
  static constexpr const char* name = "cpu";
  /// Whether the host reads and writes its memory in place.
  static constexpr bool host_reads = true;
  /// Whether work is queued there, so that the host may go on before it is done.
  static constexpr bool queues = false;
  /// Whether it draws tokens by itself, so that generation need not wait for the host.
  static constexpr bool draws = false;
  /// Tokens that Model::extend computes at once: bounds its workspace, and is wide enough for full-rate products.
  static constexpr Index prefill_chunk = 512;
  /// Of a context that was asked for so many, 0: all; in context.hpp.
  static int threads(int wanted);
};

template <>
struct DeviceTraits<cuda> {
  static constexpr const char* name = "cuda";
  static constexpr bool host_reads = false;
  static constexpr bool queues = true;
  static constexpr bool draws = true;
  static constexpr Index prefill_chunk = 2048;
  static constexpr int threads(int) { return 1; }
};

template <class Device>
inline constexpr bool draws = DeviceTraits<Device>::draws;

}  // namespace zamba
