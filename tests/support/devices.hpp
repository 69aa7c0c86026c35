// SPDX-License-Identifier: MIT
// One test body for all devices. A .cu that includes the body of a .cpp names in ZAMBA_TEST_ON where to run it; each
// test file has its own On<Device, T>. Bodies about whole models run on ZAMBA_TEST_DEVICE.
#pragma once

#include <type_traits>

#include <zamba/context.hpp>

#ifndef ZAMBA_TEST_ON
#define ZAMBA_TEST_ON On<cpu, float>, On<cpu, double>
#endif

#ifndef ZAMBA_TEST_DEVICE
#define ZAMBA_TEST_DEVICE cpu
#endif

namespace zamba_test {

using TestDevice = zamba::ZAMBA_TEST_DEVICE;

}  // namespace zamba_test

namespace zamba::testing {

/// A context of so many threads; a GPU has no such choice.
template <class Device>
Context<Device> new_context(int threads) {
  if constexpr (std::is_same_v<Device, cpu>)
    return Context<Device>(threads);
  else
    return Context<Device>();
}

}  // namespace zamba::testing
