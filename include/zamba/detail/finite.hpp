// SPDX-License-Identifier: MIT
// Which numbers are finite, told from their bits: under flags such as -ffast-math a compiler may take every comparison
// that asks so for true.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <zamba/device.hpp>
#include <zamba/number.hpp>

namespace zamba::detail {

/// The bits of a floating-point type, and those of its exponent, which are all set in NaN and infinity alone.
template <class T>
using bits_of =
    std::conditional_t<sizeof(T) == 8, std::uint64_t, std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>>;
template <class T>
inline constexpr bits_of<T> exponent_bits = std::is_same_v<T, double>  ? bits_of<T>(0x7ff0000000000000u)
                                            : std::is_same_v<T, float> ? bits_of<T>(0x7f800000u)
                                                                       : bits_of<T>(0x7f80u);

template <class T>
bool is_finite(T value) {
  return (std::bit_cast<bits_of<T>>(value) & exponent_bits<T>) != exponent_bits<T>;
}

/// The place of the first of `count` values that is not finite, or count. The values may start at any address.
template <class T>
Index first_non_finite(const void* values, Index count) {
  using Bits = bits_of<T>;
  const auto* const from = static_cast<const std::byte*>(values);
  const auto bad = [from](Index i) __attribute__((always_inline)) {
    Bits bits;
    std::memcpy(&bits, from + i * static_cast<Index>(sizeof(Bits)), sizeof(Bits));
    return static_cast<Bits>((bits & exponent_bits<T>) == exponent_bits<T>);
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

}  // namespace zamba::detail
