// SPDX-License-Identifier: MIT
// Logits where the host reads them.
#pragma once

#include <span>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/tensor.hpp>

namespace zamba::detail {

/// `count` numbers of a device's memory as floats of the host; room is for what they are on the way.
template <class Device, class A>
void widen_to_host(const A* from, std::size_t count, std::vector<A>& room, std::vector<float>& to) {
  if constexpr (!DeviceTraits<Device>::host_reads) {
    room.resize(count);
    Memory<Device>::copy_to_host(room.data(), from, count * sizeof(A));
    from = room.data();
  }
  to.resize(count);
  for (std::size_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

/// A row of logits as the sampler reads it: in place where the host can, else copied into `room` and widened to float.
template <class Device, class A>
auto host_logits(Matrix<const A> logits, Index row, [[maybe_unused]] std::vector<A>& room,
                 [[maybe_unused]] std::vector<float>& widened) {
  const auto count = static_cast<std::size_t>(logits.cols());
  if constexpr (DeviceTraits<Device>::host_reads) {
    return std::span<const A>(logits[row].data, count);
  } else {
    widen_to_host<Device>(logits[row].data, count, room, widened);
    return std::span<const float>(widened);
  }
}

}  // namespace zamba::detail
