// SPDX-License-Identifier: MIT
// One register of numbers, and the few functions of it that the elementwise operators need.
// Compiler vector types (g++, clang and nvcc's host pass) give explicit vectorisation at -O2 for whatever instruction
// set the user compiles for: AVX-512, AVX2 or SSE2.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <zamba/device.hpp>
#include <zamba/number.hpp>

namespace zamba::kernel {

#if defined(__AVX512F__)
inline constexpr int register_bytes = 64;
#elif defined(__AVX__)
inline constexpr int register_bytes = 32;
#else
inline constexpr int register_bytes = 16;
#endif

template <class T>
struct PackTypes;
template <>
struct PackTypes<float> {
  typedef float Values __attribute__((vector_size(register_bytes)));
  typedef std::int32_t Bits __attribute__((vector_size(register_bytes)));
  static constexpr float lowest_exponent = -87.0f, highest_exponent = 88.0f;  // exp stays normal and finite between
  static constexpr float round_to_integer = 0x1.8p23f;  // added, the sum's last bits are the nearest integer
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int mantissa_bits = 23, exp_degree = 7, exp2_degree = 6, log1p_terms = 8;
  /// Least greatest relative error, 2e-9, among those that are 1 at 0: found by Lawson's iteration.
  static constexpr float exp2_coefficients[] = {1.0f,           0.693147203f,   0.240226479f,   0.0555033247f,
                                                0.00961843735f, 0.00133988749f, 0.000153533640f};
};
template <>
struct PackTypes<double> {
  typedef double Values __attribute__((vector_size(register_bytes)));
  typedef std::int64_t Bits __attribute__((vector_size(register_bytes)));
  static constexpr double lowest_exponent = -708.0, highest_exponent = 709.0;
  static constexpr double round_to_integer = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  static constexpr int mantissa_bits = 52, exp_degree = 13, exp2_degree = 13, log1p_terms = 17;
  /// (ln 2)^k / k!
  static constexpr double exp2_coefficients[] = {1.0,
                                                 0.69314718055994531,
                                                 0.24022650695910071,
                                                 0.05550410866482158,
                                                 0.0096181291076284772,
                                                 0.0013333558146428443,
                                                 0.0001540353039338161,
                                                 1.525273380405984e-5,
                                                 1.3215486790144309e-6,
                                                 1.01780860092397e-7,
                                                 7.0549116208011233e-9,
                                                 4.4455382718708115e-10,
                                                 2.5678435993488205e-11,
                                                 1.3691488853904129e-12};
};

/// A register of T: float or double.
template <class T>
using Pack = typename PackTypes<T>::Values;

/// How many T a register holds.
template <class T>
inline constexpr Index lanes = register_bytes / static_cast<Index>(sizeof(T));

/// Zero in every lane. A function, because nvcc 13.0 with --expt-relaxed-constexpr crashes on `Pack<T> sum = {}` in a
/// lambda.
template <class T>
[[gnu::always_inline]] inline Pack<T> zeros() {
  return Pack<T>{};
}

template <class T>
[[gnu::always_inline]] inline Pack<T> load(const T* from) {
  Pack<T> pack;
  std::memcpy(&pack, from, sizeof(pack));
  return pack;
}

/// The first `count` values; zeros beyond.
template <class T>
[[gnu::always_inline]] inline Pack<T> load(const T* from, Index count) {
  if (count >= lanes<T>) return load(from);
  Pack<T> pack = {};
  std::memcpy(&pack, from, static_cast<std::size_t>(count) * sizeof(T));
  return pack;
}

template <class T>
[[gnu::always_inline]] inline void store(T* to, const Pack<T>& pack) {
  std::memcpy(to, &pack, sizeof(pack));
}

template <class T>
[[gnu::always_inline]] inline void store(T* to, const Pack<T>& pack, Index count) {
  if (count >= lanes<T>) return store(to, pack);
  std::memcpy(to, &pack, static_cast<std::size_t>(count) * sizeof(T));
}

/// A register of floats from bf16, which is the upper half of a float.
[[gnu::always_inline]] inline Pack<float> load_bf16(const bf16* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  constexpr __mmask16 all = 0xffff;
  return (Pack<float>)_mm512_maskz_slli_epi32(all, _mm512_maskz_cvtepu16_epi32(all, halves), 16);
#elif defined(__AVX2__)  // g++ 12 makes four shuffles of the conversion below
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Pack<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  typedef std::uint16_t Halves __attribute__((vector_size(register_bytes / 2)));
  typedef std::uint32_t Words __attribute__((vector_size(register_bytes)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Pack<float>)(__builtin_convertvector(halves, Words) << 16);
#endif
}

/// The first `count` of values stored as S, in a register of T; zeros beyond.
template <class T, class S>
[[gnu::always_inline]] inline Pack<T> load_as(const S* from, Index count) {
  if constexpr (std::is_same_v<T, S>) {
    return load(from, count);
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<S, bf16>) {
    if (count >= lanes<T>) return load_bf16(from);
    bf16 padded[lanes<T>] = {};
    std::memcpy(static_cast<void*>(padded), from, static_cast<std::size_t>(count) * sizeof(S));
    return load_bf16(padded);
  } else {
    T values[lanes<T>] = {};
    for (Index i = 0; i < lanes<T> && i < count; ++i) values[i] = static_cast<T>(static_cast<compute_t<S>>(from[i]));
    return load(values);
  }
}

/// Asks for `bytes` from `from` on, a cache line at a time. Any address will do.
[[gnu::always_inline]] inline void prefetch(const void* from, Index bytes) {
  for (Index line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(from) + line);
}

/// f(first, count) for each register of [0, n); a full one has its count as a constant, so loads need no test.
template <class T, class F>
[[gnu::always_inline]] inline void for_packs(Index n, F&& f) {
  constexpr std::integral_constant<Index, lanes<T>> full;
  Index i = 0;
  for (; i + full <= n; i += full) f(i, full);
  if (i < n) f(i, n - i);
}

/// f(0), ..., f(N - 1) with constant arguments, so that arrays indexed by them stay in registers at -O2.
template <Index N, class F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  [&]<Index... I>(std::integer_sequence<Index, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<Index, I>{}), ...);
  }
  (std::make_integer_sequence<Index, N>{});
}

/// A register of T that may be a part of the machine's. A type of its own: nvcc deduces nothing through an attribute on
/// a parameter.
template <class T, int Bytes>
struct Lanes {
  typedef T Values __attribute__((vector_size(Bytes)));
};

/// The sum of the lanes, by halves: a fixed order, within registers.
template <class T, int Bytes = register_bytes>
[[gnu::always_inline]] inline T sum(const typename Lanes<T, Bytes>::Values& pack) {
  if constexpr (Bytes == 2 * sizeof(T)) {
    return pack[0] + pack[1];
  } else {
    typename Lanes<T, Bytes / 2>::Values halves[2];
    std::memcpy(halves, &pack, Bytes);
    return sum<T, Bytes / 2>(halves[0] + halves[1]);
  }
}

/// x in every lane. Where registers are 64 bytes, nvcc 13.0 crashes on the sum with a constant in place of x.
template <class T>
[[gnu::always_inline]] inline Pack<T> broadcast(T x) {
  return Pack<T>{} + x;
}

/// The larger of each lane; b where a lane of b is NaN. Spelled out for the instruction of that meaning, which g++ does
/// not find.
template <class T>
[[gnu::always_inline]] inline Pack<T> max(const Pack<T>& a, const Pack<T>& b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Pack<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  if constexpr (std::is_same_v<T, double>) return (Pack<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (Pack<T>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<T, double>) return (Pack<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}

/// The smaller of each lane; b where a lane of b is NaN.
template <class T>
[[gnu::always_inline]] inline Pack<T> min(const Pack<T>& a, const Pack<T>& b) {
  return -max<T>(-a, -b);
}

/// a b + c: in one rounding where the machine can. Spelled out where sums must not depend on the shape of a loop, by
/// which compilers choose between one instruction and two.
template <class T>
[[gnu::always_inline]] inline Pack<T> multiply_add(const Pack<T>& a, const Pack<T>& b, const Pack<T>& c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Pack<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (std::is_same_v<T, double>) return (Pack<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (std::is_same_v<T, float>) return (Pack<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (std::is_same_v<T, double>) return (Pack<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

/// coefficient(k) as a constant of the program.
template <int k, class T, class Coefficient>
consteval T value(Coefficient coefficient) {
  return coefficient(k);
}

/// sum over k in [First, Last] of coefficient(k) r^(k - First), by Horner's rule. A recursion rather than a loop: -O2
/// of g++ leaves such loops rolled.
template <int First, int Last, class T, class Coefficient>
[[gnu::always_inline]] inline Pack<T> horner(const Pack<T>& r, Coefficient coefficient) {
  if constexpr (First == Last)
    return Pack<T>{} + value<Last, T>(coefficient);
  else
    return horner<First + 1, Last, T>(r, coefficient) * r + value<First, T>(coefficient);
}

/// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial in r, and n added to the exponent bits.
/// Relative error at most 2e-7 (float), 4e-16 (double). Clamped to the normal range: e^-1000 is the smallest normal
/// number, not 0. NaN stays NaN.
template <class T>
[[gnu::always_inline]] inline Pack<T> exp(Pack<T> x) {
  using P = PackTypes<T>;
  x = min<T>(Pack<T>{} + P::highest_exponent, max<T>(Pack<T>{} + P::lowest_exponent, x));
  const Pack<T> shifted = ZAMBA_AS_WRITTEN(x * T(1.44269504088896340736) + P::round_to_integer);
  const Pack<T> n = ZAMBA_AS_WRITTEN(shifted - P::round_to_integer);
  const Pack<T> r = ZAMBA_AS_WRITTEN(x - n * P::ln2_high) - n * P::ln2_low;
  const Pack<T> value = horner<0, P::exp_degree, T>(r, [](int k) {
    T factorial = 1;
    for (int i = 2; i <= k; ++i) factorial *= T(i);
    return T(1) / factorial;
  });
  using Bits = typename P::Bits;
  return (Pack<T>)((Bits)value + ((Bits)shifted << P::mantissa_bits));
}

/// 2^x for x <= 0: x = n + f with |f| <= 1/2, a polynomial in f that is 1 at 0, and n added to the exponent bits.
/// Relative error at most 2e-7 (float), 4e-16 (double). Clamped as exp; NaN stays NaN.
template <class T>
[[gnu::always_inline]] inline Pack<T> exp2_of_negative(Pack<T> x) {
  using P = PackTypes<T>;
  x = max<T>(Pack<T>{} + P::lowest_exponent * T(1.44269504088896340736), x);
  const Pack<T> shifted = ZAMBA_AS_WRITTEN(x + P::round_to_integer);
  const Pack<T> f = x - ZAMBA_AS_WRITTEN(shifted - P::round_to_integer);
  const Pack<T> value = horner<0, P::exp2_degree, T>(f, [](int k) { return P::exp2_coefficients[k]; });
  using Bits = typename P::Bits;
  return (Pack<T>)((Bits)value + ((Bits)shifted << P::mantissa_bits));
}

/// 1 / (1 + e^-x)
template <class T>
[[gnu::always_inline]] inline Pack<T> sigmoid(const Pack<T>& x) {
  return T(1) / (T(1) + exp<T>(-x));
}

/// log1p(e^x), and x itself above 20: max(x, 0) + log1p(e^-|x|), with log1p(y) = 2 artanh(y / (2 + y)) as a series in
/// 2 s, s = y / (2 + y) <= 1/3. Relative error at most 3e-7 (float), 6e-16 (double).
template <class T>
[[gnu::always_inline]] inline Pack<T> softplus(const Pack<T>& x) {
  const Pack<T> y = exp<T>(x < T(0) ? x : -x);
  const Pack<T> twice = (y + y) / (T(2) + y);
  const Pack<T> log1p = twice * horner<0, PackTypes<T>::log1p_terms - 1, T>(twice * twice, [](int k) {
                          T weight = T(1) / T(2 * k + 1);
                          for (int i = 0; i < k; ++i) weight /= 4;
                          return weight;
                        });
  const Pack<T> positive = x < T(0) ? Pack<T>{} : x;
  return x > T(20) ? x : positive + log1p;
}

}  // namespace zamba::kernel
