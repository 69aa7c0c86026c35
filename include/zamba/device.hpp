// SPDX-License-Identifier: MIT
// Device tags, index types, and the one macro that lets a function run on both sides.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ZAMBA_HOST_DEVICE __host__ __device__
#else
#define ZAMBA_HOST_DEVICE
#endif

namespace zamba {

/// Extents, strides and offsets. 64 bits everywhere: a Zamba-7B weight tensor times a batch exceeds 2^31 elements.
using Index = std::int64_t;

/// A token id. Negative as a target means "no loss at this position".
using Token = std::int32_t;

/// Runs through Eigen on the host.
struct cpu {
  static constexpr const char* name = "cpu";
};

/// Runs through the kernels of the `.cuh` files, under nvcc.
struct cuda {
  static constexpr const char* name = "cuda";
};

/// Whether a device has the backward passes that training needs.
template <class Device>
inline constexpr bool trains = true;
template <>
inline constexpr bool trains<cuda> = false;

/// Whether a device draws tokens by itself, so that generation need not wait for the host.
template <class Device>
inline constexpr bool draws = false;
template <>
inline constexpr bool draws<cuda> = true;

}  // namespace zamba
