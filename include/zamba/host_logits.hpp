// SPDX-License-Identifier: MIT
// Logits where the host reads them.
#pragma once

#include <span>
#include <type_traits>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/tensor.hpp>

namespace zamba::detail {

/// A row of logits as the sampler reads it: in place on the CPU, else copied into `room` and widened to float.
template <class Device, class A>
auto host_logits(Matrix<const A> logits, Index row, [[maybe_unused]] std::vector<A>& room,
                 [[maybe_unused]] std::vector<float>& widened) {
  const auto count = static_cast<std::size_t>(logits.cols());
  if constexpr (std::is_same_v<Device, cpu>) {
    return std::span<const A>(logits[row].data, count);
  } else {
    room.resize(count);
    Memory<Device>::copy_to_host(room.data(), logits[row].data, count * sizeof(A));
    widened.assign(room.begin(), room.end());
    return std::span<const float>(widened);
  }
}

}  // namespace zamba::detail
