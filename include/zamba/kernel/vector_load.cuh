// SPDX-License-Identifier: MIT
// Loads and stores of 16 bytes a lane, which memory needs to run at its full rate.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <zamba/device.hpp>
#include <zamba/kernel/mma.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// How many A are in 16 bytes.
template <class A>
inline constexpr int wide = 16 / static_cast<int>(sizeof(A));

/// Width elements as they lie in memory: one, or 16 bytes of them.
template <int Width, class A>
struct Piece {
  static_assert(Width == 1 || Width == wide<A>, "zamba: a piece is one element or 16 bytes");
  using Raw = std::conditional_t<Width == 1, A, uint4>;
  Raw raw;

  __device__ void values(compute_t<A> (&to)[Width]) const {
    if constexpr (Width == 1) {
      to[0] = compute_t<A>(raw);
    } else if constexpr (std::is_same_v<A, bf16>) {
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
};

/// The piece at an address that is aligned to it.
template <int Width, class A>
__device__ Piece<Width, A> piece_at(const A* from) {
  return {*reinterpret_cast<const typename Piece<Width, A>::Raw*>(from)};
}

/// The same of memory that is read once: it gives way in the caches to what is read again.
template <int Width, class A>
__device__ Piece<Width, A> piece_once_at(const A* from) {
  if constexpr (Width == 1)
    return piece_at<1>(from);
  else
    return {__ldcs(reinterpret_cast<const uint4*>(from))};
}

/// 16 bytes from an aligned address, as compute_t.
template <class A>
__device__ void load_16_bytes(const A* from, compute_t<A> (&to)[16 / sizeof(A)]) {
  Piece<wide<A>, A>{__ldg(reinterpret_cast<const uint4*>(from))}.values(to);
}

/// Width elements from an address that is aligned to them, as compute_t: one, or 16 bytes of them.
template <int Width, class A>
__device__ void load_piece(const A* from, compute_t<A> (&to)[Width]) {
  if constexpr (Width == 1)
    to[0] = compute_t<A>(*from);
  else
    load_16_bytes(from, to);
}

/// load(from, part) for every 16 bytes of Width values, or for each where they are fewer.
template <int Width, class F, class Load>
__device__ void load_parts(const F* from, F (&to)[Width], Load&& load) {
  constexpr int each = Width < wide<F> ? 1 : wide<F>;
#pragma unroll
  for (int i = 0; i < Width; i += each) {
    F part[each];
    load(from + i, part);
#pragma unroll
    for (int j = 0; j < each; ++j) to[i + j] = part[j];
  }
}

/// Width values of compute_t from an address that is aligned to 16 bytes where they are that many or more.
template <int Width, class F>
__device__ void load_values(const F* from, F (&to)[Width]) {
  load_parts(from, to, []<int Each>(const F* at, F(&part)[Each]) { load_piece<Each>(at, part); });
}

/// The same of memory that is also written while the kernel runs.
template <int Width, class F>
__device__ void load_written_values(const F* from, F (&to)[Width]) {
  load_parts(from, to, []<int Each>(const F* at, F(&part)[Each]) { piece_at<Each>(at).values(part); });
}

/// Rounds Width values and writes them to an address that is aligned to them.
template <int Width, class A>
__device__ void store_piece(A* to, const compute_t<A> (&values)[Width]) {
  static_assert(Width == 1 || Width == wide<A>, "zamba: a piece is one element or 16 bytes");
  if constexpr (Width == 1) {
    *to = A(values[0]);
  } else if constexpr (std::is_same_v<A, bf16>) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                                               pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
  } else {
    uint4 raw;
    memcpy(&raw, values, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  }
}

/// Writes Width values of compute_t to an address that is aligned to 16 bytes where they are that many or more.
template <int Width, class F>
__device__ void store_values(F* to, const F (&values)[Width]) {
  constexpr int each = Width < wide<F> ? 1 : wide<F>;
#pragma unroll
  for (int i = 0; i < Width / each; ++i) {
    F part[each];
#pragma unroll
    for (int j = 0; j < each; ++j) part[j] = values[i * each + j];
    store_piece<each>(to + i * each, part);
  }
}

/// Writes a piece as it is.
template <int Width, class A>
__device__ void store_piece(A* to, const Piece<Width, A>& piece) {
  *reinterpret_cast<typename Piece<Width, A>::Raw*>(to) = piece.raw;
}

/// Whether every row begins at a multiple of `count` elements of memory.
template <class A, int Rank>
bool aligned(Tensor<A, Rank> m, Index count) {
  bool all = reinterpret_cast<std::uintptr_t>(m.data) % (static_cast<std::size_t>(count) * sizeof(A)) == 0;
  for (int i = 0; i + 1 < Rank; ++i) all = all && m.stride[i] % count == 0;
  return all;
}

/// Whether every row begins at a multiple of 16 bytes and is a whole number of them.
template <class A, int Rank>
bool in_pieces(Tensor<A, Rank> m) {
  return aligned(m, wide<A>) && m.cols() % wide<A> == 0;
}

}  // namespace zamba::kernel
