// SPDX-License-Identifier: MIT
// A device whose memory is taken, for tests of what happens then.
#pragma once

#include <cstddef>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/error.hpp>

namespace zamba_test {

/// All of a device's free memory, but for pieces of less than `least` bytes.
template <class Device>
std::vector<zamba::Buffer<Device>> all_free_memory(std::size_t least) {
  std::vector<zamba::Buffer<Device>> taken;
  for (std::size_t bytes = std::size_t{1} << 40; bytes >= least;) {
    try {
      taken.emplace_back(bytes);
    } catch (const zamba::OutOfMemory&) {
      bytes /= 2;
    }
  }
  return taken;
}

}  // namespace zamba_test
