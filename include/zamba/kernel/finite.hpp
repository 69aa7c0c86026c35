// SPDX-License-Identifier: MIT
// first_non_finite: the first of many stored numbers that is NaN or infinite.
#pragma once

#include <cstddef>
#include <cstring>

#include <zamba/device.hpp>
#include <zamba/number.hpp>

namespace zamba::kernel {

/// The place of the first of `count` values that is not finite, or count. The values may start at any address.
template <class T>
Index first_non_finite(const void* values, Index count) {
  using Bits = typename detail::Magnitude<T>::Bits;
  const auto* const from = static_cast<const std::byte*>(values);
  const auto bad = [from](Index i) __attribute__((always_inline)) {
    Bits bits;
    std::memcpy(&bits, from + i * static_cast<Index>(sizeof(Bits)), sizeof(Bits));
    return static_cast<Bits>((bits & detail::Magnitude<T>::infinity) == detail::Magnitude<T>::infinity);
  };
  constexpr Index block = 256;  // a loop of constant length is one that compilers vectorise at -O2
  Index i = 0;
  for (; i + block <= count; i += block) {
    Bits any = 0;
    for (Index k = 0; k < block; ++k) any = static_cast<Bits>(any | bad(i + k));
    if (any) break;
  }
  while (i < count && !bad(i)) ++i;
  return i;
}

}  // namespace zamba::kernel
