// SPDX-License-Identifier: MIT
// Vectorised loads and stores: several neighbouring elements in one instruction of up to 16 bytes a lane, which memory
// needs to run at its full rate.
//
//   load_vector<N>(from)             ld.global.v4       any memory
//   load_vector_readonly<N>(from)    ld.global.nc.v4    what no thread writes while the kernel runs
//   load_vector_streaming<N>(from)   ld.global.cs.v4    what is read once: first to leave the caches
//   load_vector_masked<N, Aligned>(from, count)         the first `count` of N elements, zeros for the others
//   store_vector(to, vector or values), store_vector_masked<Aligned>(to, values, count)
//   store_vector_streaming(to, vector)                  st.global.cs.v4
//
// A vector holds elements as they lie in memory; vector[i], unpack() and pack() convert from and to compute_t.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <zamba/device.hpp>
#include <zamba/kernel/math.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// How many T are in 16 bytes, the widest load of a lane.
template <class T>
inline constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

/// N neighbouring elements in registers: one of any type, or 4, 8 or a multiple of 16 bytes.
template <class T, int N>
struct AlignedVector {
  static constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(N == 1 || bytes == 4 || bytes == 8 || bytes % 16 == 0, "zamba: a vector is 4, 8 or 16 bytes, or more");
  /// What one instruction moves.
  using Word =
      std::conditional_t<N == 1, T,
                         std::conditional_t<bytes == 4, unsigned, std::conditional_t<bytes == 8, uint2, uint4>>>;
  static constexpr int count = bytes / static_cast<int>(sizeof(Word));
  Word words[count];

  __device__ compute_t<T> operator[](int i) const {
    if constexpr (N == 1) {
      return compute_t<T>(words[0]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      const unsigned pair = reinterpret_cast<const unsigned*>(words)[i / 2];
      return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
      T element;
      memcpy(&element, reinterpret_cast<const unsigned char*>(words) + i * sizeof(T), sizeof(T));
      return compute_t<T>(element);
    }
  }

  __device__ void unpack(compute_t<T> (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = (*this)[i];
  }

  /// Each rounded to nearest even.
  __device__ static AlignedVector pack(const compute_t<T> (&values)[N]) {
    AlignedVector vector;
    if constexpr (N == 1) {
      vector.words[0] = T(values[0]);
    } else if constexpr (std::is_same_v<T, bf16>) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        reinterpret_cast<unsigned*>(vector.words)[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T element(values[i]);
        memcpy(reinterpret_cast<unsigned char*>(vector.words) + i * sizeof(T), &element, sizeof(T));
      }
    }
    return vector;
  }
};

/// N elements from an address that is aligned to them, or to 16 bytes where they are more.
template <int N, class T>
__device__ AlignedVector<T, N> load_vector(const T* from) {
  using Vector = AlignedVector<T, N>;
  Vector vector;
#pragma unroll
  for (int i = 0; i < Vector::count; ++i) vector.words[i] = reinterpret_cast<const typename Vector::Word*>(from)[i];
  return vector;
}

/// The same of memory that nothing writes while the kernel runs.
template <int N, class T>
__device__ AlignedVector<T, N> load_vector_readonly(const T* from) {
  static_assert(N > 1, "zamba: single elements are loaded as they are");
  using Vector = AlignedVector<T, N>;
  Vector vector;
#pragma unroll
  for (int i = 0; i < Vector::count; ++i)
    vector.words[i] = __ldg(reinterpret_cast<const typename Vector::Word*>(from) + i);
  return vector;
}

/// The same of memory that is read once: it gives way in the caches to what is read again.
template <int N, class T>
__device__ AlignedVector<T, N> load_vector_streaming(const T* from) {
  using Vector = AlignedVector<T, N>;
  if constexpr (N == 1) {
    return load_vector<1>(from);
  } else {
    Vector vector;
#pragma unroll
    for (int i = 0; i < Vector::count; ++i)
      vector.words[i] = __ldcs(reinterpret_cast<const typename Vector::Word*>(from) + i);
    return vector;
  }
}

/// The first `count` of N elements, zeros for the others. Aligned: from an aligned address, all of them or none.
template <int N, bool Aligned, class T>
__device__ AlignedVector<T, N> load_vector_masked(const T* from, int count) {
  AlignedVector<T, N> vector{};
  if constexpr (Aligned) {
    if (count > 0) vector = load_vector<N>(from);
  } else if constexpr (std::is_same_v<T, bf16>) {
    unsigned pairs[N / 2] = {};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) pairs[i / 2] |= static_cast<unsigned>(from[i].bits) << i % 2 * 16;
    memcpy(vector.words, pairs, sizeof(pairs));
  } else {
    T elements[N] = {};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) elements[i] = from[i];
    memcpy(vector.words, elements, sizeof(elements));
  }
  return vector;
}

/// Writes a vector to an address that is aligned to it.
template <class T, int N>
__device__ void store_vector(T* to, const AlignedVector<T, N>& vector) {
  using Vector = AlignedVector<T, N>;
#pragma unroll
  for (int i = 0; i < Vector::count; ++i) reinterpret_cast<typename Vector::Word*>(to)[i] = vector.words[i];
}

/// The same, of what is not read soon: it gives way in the caches.
template <class T, int N>
__device__ void store_vector_streaming(T* to, const AlignedVector<T, N>& vector) {
  static_assert(N > 1, "zamba: single elements are stored as they are");
  using Vector = AlignedVector<T, N>;
#pragma unroll
  for (int i = 0; i < Vector::count; ++i) __stcs(reinterpret_cast<typename Vector::Word*>(to) + i, vector.words[i]);
}

/// Rounds N values and writes them to an address that is aligned to them.
template <class T, int N>
__device__ void store_vector(T* to, const compute_t<T> (&values)[N]) {
  store_vector(to, AlignedVector<T, N>::pack(values));
}

/// Rounds and writes the first `count` of N values. Aligned: to an aligned address, all of them or none.
template <bool Aligned, class T, int N>
__device__ void store_vector_masked(T* to, const compute_t<T> (&values)[N], int count) {
  if constexpr (Aligned) {
    if (count > 0) store_vector(to, values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = T(values[i]);
  }
}

/// Whether every row begins at a multiple of `count` elements of memory.
template <class T, int Rank>
bool aligned(Tensor<T, Rank> m, Index count) {
  bool all = reinterpret_cast<std::uintptr_t>(m.data) % (static_cast<std::size_t>(count) * sizeof(T)) == 0;
  for (int i = 0; i + 1 < Rank; ++i) all = all && m.stride[i] % count == 0;
  return all;
}

/// Whether every row begins at a multiple of 16 bytes and is a whole number of them.
template <class T, int Rank>
bool in_vectors(Tensor<T, Rank> m) {
  return aligned(m, vector_width<T>) && m.cols() % vector_width<T> == 0;
}

}  // namespace zamba::kernel
