// SPDX-License-Identifier: MIT
// Storage types of weights, the type in which their arithmetic is done, and what is no number.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include <zamba/device.hpp>

namespace zamba {

namespace detail {

/// The bits of a double, float or bf16 without its sign, and those of infinity: greater is a NaN, less is finite.
template <class F>
struct Magnitude {
  using Bits = std::conditional_t<sizeof(F) == 8, std::uint64_t,
                                  std::conditional_t<sizeof(F) == 4, std::uint32_t, std::uint16_t>>;
  static constexpr Bits infinity = static_cast<Bits>(sizeof(F) == 8   ? 0x7ff0000000000000
                                                     : sizeof(F) == 4 ? 0x7f800000
                                                                      : 0x7f80);
  ZAMBA_HOST_DEVICE static constexpr Bits of(F value) {
    return __builtin_bit_cast(Bits, value) & (Bits(~Bits{0}) >> 1);
  }
};

}  // namespace detail

/// Whether a double, float or bf16 is a NaN, or neither that nor an infinity. Its bits are looked at, so that no
/// assumption about arithmetic (-fno-honor-nans, say) removes the test.
template <class F>
ZAMBA_HOST_DEVICE constexpr bool is_nan(F value) {
  return detail::Magnitude<F>::of(value) > detail::Magnitude<F>::infinity;
}
template <class F>
ZAMBA_HOST_DEVICE constexpr bool is_finite(F value) {
  return detail::Magnitude<F>::of(value) < detail::Magnitude<F>::infinity;
}

/// bfloat16: the upper half of a float. A storage type; arithmetic converts to float first.
/// The conversions use the compiler's bit cast, because std::bit_cast is no device function.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  /// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
  ZAMBA_HOST_DEVICE constexpr explicit bf16(float value) {
    const std::uint32_t u = __builtin_bit_cast(std::uint32_t, value);
    bits = static_cast<std::uint16_t>(is_nan(value) ? (u >> 16) | 0x0040u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  ZAMBA_HOST_DEVICE constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }
};

/// IEEE half precision, met in checkpoint files only.
struct f16 {
  std::uint16_t bits = 0;

  /// Exact: every half is a float.
  constexpr operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1fu;
    const std::uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      return sign ? -magnitude : magnitude;
    }
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  }
};

/// The type of sums, norms, softmax, recurrent state, gradients and optimiser state for weights stored as T:
/// double for double, float for everything else.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

/// The type of activations between operators: compute_t<T> on the CPU, T itself on CUDA.
template <class T, class Device>
using activation_t = std::conditional_t<std::is_same_v<Device, cpu>, compute_t<T>, std::remove_const_t<T>>;

}  // namespace zamba
