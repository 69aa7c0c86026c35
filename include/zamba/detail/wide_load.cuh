// SPDX-License-Identifier: MIT
// Loads of 16 bytes a lane, which memory needs to run at its full rate.
#pragma once

#include <cstring>
#include <type_traits>

#include <zamba/device.hpp>
#include <zamba/number.hpp>

namespace zamba::detail {

/// How many A are in 16 bytes.
template <class A>
inline constexpr int wide = 16 / static_cast<int>(sizeof(A));

/// 16 bytes from an aligned address, as compute_t.
template <class A>
__device__ void load_16_bytes(const A* from, compute_t<A> (&to)[16 / sizeof(A)]) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
  if constexpr (std::is_same_v<A, bf16>) {
    const unsigned words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    memcpy(to, &raw, sizeof(raw));
  }
}

/// Width elements from an address that is aligned to them, as compute_t: one, or 16 bytes of them.
template <int Width, class A>
__device__ void load_piece(const A* from, compute_t<A> (&to)[Width]) {
  static_assert(Width == 1 || Width == wide<A>, "zamba: a piece is one element or 16 bytes");
  if constexpr (Width == 1)
    to[0] = compute_t<A>(*from);
  else
    load_16_bytes(from, to);
}

}  // namespace zamba::detail
