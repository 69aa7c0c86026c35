// SPDX-License-Identifier: MIT
// The types of a model's numbers: of weights, of activations and caches, and of arithmetic; and what is no number.
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

/// What activations and caches are stored as, and weights unless their type is one of its own (weight.hpp).
template <class T>
concept Number = std::is_same_v<T, double> || std::is_same_v<T, float> || std::is_same_v<T, bf16>;

/// The types of a model one by one, in the place of T in Model<Net, T, Device>: of weights, of activations between
/// operators, and of key/value caches.
template <class Weights, class Activations, class Caches = Activations>
struct Types {};

namespace detail {

/// What T stands for in Model<Net, T, Device>: a number for all three, but activations on the CPU are of the type of
/// arithmetic.
template <class T>
struct TypesOf {
  using Weights = T;
  using Caches = T;
  using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
  template <class Device>
  using Activations = std::conditional_t<std::is_same_v<Device, cpu>, Compute, T>;
};
template <class W, class A, class C>
struct TypesOf<Types<W, A, C>> {
  using Weights = W;
  using Caches = C;
  using Compute = typename TypesOf<A>::Compute;
  template <class Device>
  using Activations = A;
};

}  // namespace detail

/// The type of sums, norms, softmax, recurrent state, gradients and optimiser state where activations are stored as T:
/// double for double, float for everything else.
template <class T>
using compute_t = typename detail::TypesOf<std::remove_const_t<T>>::Compute;

/// The types of a model of T on Device, where T is a number or Types<W, A, C>: of activations between operators, by
/// default compute_t<T> on the CPU and T itself on CUDA; of weights; and of key/value caches.
template <class T, class Device>
using activation_t = typename detail::TypesOf<std::remove_const_t<T>>::template Activations<Device>;
template <class T>
using weight_t = typename detail::TypesOf<T>::Weights;
template <class T>
using cache_t = typename detail::TypesOf<T>::Caches;

namespace detail {

/// Whether operators have these types of activations and caches together; those of weights are between Linear and them.
template <class T, class Device, class A = activation_t<T, Device>, class C = cache_t<T>>
inline constexpr bool types_fit = Number<A>&& Number<C>&& std::is_same_v<compute_t<C>, compute_t<A>> &&
                                  (!std::is_same_v<Device, cpu> || std::is_same_v<A, compute_t<A>>);

}  // namespace detail

}  // namespace zamba
