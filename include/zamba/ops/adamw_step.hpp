// SPDX-License-Identifier: MIT
// adamw_step: one step of AdamW on one parameter; sum_of_squares: the squared norm of all gradients, for clipping.
//
//   g = clip * d_p                       clip = min(1, clip_norm / (norm + 1e-6)), norm over all gradients;
//                                        scaled before it is squared, so that what clipping tames does not overflow
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr decay) p - lr / (1 - beta1^t) * m / ( sqrt(v / (1 - beta2^t)) + eps )
//
// Source: Loshchilov and Hutter (arXiv 1711.05101), with PyTorch's order of operations and its 1e-6 in the clipping.
// Shapes: all (n), contiguous. The squared norm stays in the device's memory, so a step needs no wait for it. Where
// that norm is not finite, or v could not hold its square after clipping, nothing is changed; nor is it where the loss,
// if that is given, is not finite.
//
// Numeric contract: elementwise arithmetic in compute_t (float, or double for double); the squares are summed in double
// over pieces of 2^14 elements, and the pieces in order. Bit-equal for any number of threads, where the arrays of a
// step are aligned to 64 bytes, as those of models and gradients are.
//
// Weights in bf16 stand for masters in float, which are stepped, to the bits of float weights. A master is split
// (SplitFloat): the weight is its upper half, and only its lower 16 bits are beside it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(AdamWStep, "adamw_step.cuh");

/// The numbers of one step.
struct AdamWScalars {
  double learning_rate, beta1, beta2, eps;
  double decay;                  // weight decay of this parameter, 0 for none
  double clip_norm;              // 0: no clipping
  Index step_number;             // t, from 1
  const double* loss = nullptr;  // of the gradients, in the device's memory
};

/// What scales gradients of this norm.
ZAMBA_HOST_DEVICE inline double clip_factor(double norm, double clip_norm) {
  const double factor = clip_norm > 0 ? clip_norm / (norm + 1e-6) : 1.0;
  return factor < 1 ? factor : 1.0;
}

namespace detail {

template <class F>
inline constexpr double largest = static_cast<double>(std::numeric_limits<F>::max());

}  // namespace detail

/// Whether gradients of this norm may be stepped with: it is finite and, clipped, its square is no overflow in F.
template <class F>
ZAMBA_HOST_DEVICE bool can_step(double norm, double clip_norm) {
  if (!is_finite(norm)) return false;
  const double clipped = norm * clip_factor(norm, clip_norm) * (1 + 1e-6);  // room for the roundings of F
  return clipped * clipped <= detail::largest<F>;
}

/// A float as the bf16 that is nearest to it and its own lower 16 bits. These, taken with their sign, are what the
/// float is above the bf16, in units in its last place: so the two say which float it is, every one but for the bits
/// of a NaN. Of two nearest bf16 it is the one away from zero. With ties to even there would be no such form: 2^16 + 1
/// floats round to each even bf16, which is one more than 16 bits tell apart. No float is split into a zero and what is
/// below it; where others have written the zero, it is what the two say.
struct SplitFloat {
  bf16 nearest;
  std::uint16_t low = 0;

  SplitFloat() = default;
  ZAMBA_HOST_DEVICE constexpr SplitFloat(bf16 weight, std::uint16_t half) : nearest(weight), low(half) {}
  ZAMBA_HOST_DEVICE constexpr explicit SplitFloat(float value) {
    const std::uint32_t bits = is_nan(value) ? 0x7fc00000u : __builtin_bit_cast(std::uint32_t, value);
    nearest.bits = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
    low = static_cast<std::uint16_t>(bits);
  }
  ZAMBA_HOST_DEVICE constexpr explicit operator float() const {
    const int above = static_cast<std::int16_t>(low);
    const bool below_zero = (nearest.bits & 0x7fffu) == 0 && above < 0;
    return __builtin_bit_cast(
        float, (static_cast<std::uint32_t>(nearest.bits) << 16) + static_cast<std::uint32_t>(below_zero ? 0 : above));
  }
};

/// The tensors of one parameter, (n) each.
template <class W, class F>
struct AdamWTensors {
  static_assert(std::is_same_v<W, F> || (std::is_same_v<W, bf16> && std::is_same_v<F, float>),
                "zamba::adamw_step: weights are of the type that steps them, or bf16 stepped in float");

  Vector<W> weight;
  Vector<std::uint16_t> low;  // of bf16 weights: the lower halves of their masters; else empty
  Vector<const F> gradient;
  Vector<F> m, v;
};

/// Bytes of what an optimiser keeps beside n weights: their moments, the lower halves of masters, and the numbers of a
/// step.
template <class W, class F>
constexpr std::size_t adamw_state_bytes(Index n) {
  const auto of = [n](std::size_t element) { return align_up(static_cast<std::size_t>(n) * element); };
  return 2 * of(sizeof(F)) + (std::is_same_v<W, F> ? 0 : of(sizeof(std::uint16_t))) + alignment;
}

/// The numbers of a step in the arithmetic of F.
template <class F>
struct AdamWFactors {
  F beta1, beta2, eps;
  F keep;                                 // 1 - lr decay
  F rate;                                 // lr / (1 - beta1^t)
  F root;                                 // 1 / sqrt(1 - beta2^t)
  double share1, root_share2, clip_norm;  // 1 - beta1, sqrt(1 - beta2)
  // Known with the norm: what a gradient is scaled by, what it adds to m then, and the root of what it adds to v. In
  // two factors where it is tiny, because one alone would lose its digits among the least floats.
  F coarse = 1, gain1 = 0, root2 = 0;

  explicit AdamWFactors(const AdamWScalars& s)
      : beta1(static_cast<F>(s.beta1)),
        beta2(static_cast<F>(s.beta2)),
        eps(static_cast<F>(s.eps)),
        keep(static_cast<F>(1 - s.learning_rate * s.decay)),
        rate(static_cast<F>(s.learning_rate / (1 - std::pow(s.beta1, static_cast<double>(s.step_number))))),
        root(static_cast<F>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step_number))))),
        share1(1 - s.beta1),
        root_share2(std::sqrt(1 - s.beta2)),
        clip_norm(s.clip_norm) {}

  /// Takes the squared norm of all gradients; whether they may be stepped with.
  ZAMBA_HOST_DEVICE bool clip(double norm_squared) {
    const double norm = ::sqrt(norm_squared);
    if (!can_step<F>(norm, clip_norm)) return false;
    const double factor = clip_factor(norm, clip_norm), large = factor < 0x1p-100 ? 0x1p-100 : 1, fine = factor / large;
    coarse = static_cast<F>(large);
    gain1 = static_cast<F>(share1 * fine);
    root2 = static_cast<F>(root_share2 * fine);
    return true;
  }
};

/// Steps one parameter. norm_squared: one element, of all gradients.
template <class Device, class W, class F>
void adamw_step(Context<Device>& ctx, const AdamWTensors<W, F>& tensors, const AdamWScalars& scalars,
                const double* norm_squared) {
  if constexpr (checked) {
    const kernel::Door door{"adamw_step"};
    const Index n = tensors.weight.size();
    door.shape("low", tensors.low, std::is_same_v<W, F> ? 0 : n);
    door.shape("gradient", tensors.gradient, n);
    door.shape("m", tensors.m, n);
    door.shape("v", tensors.v, n);
  }
  AdamWStep<Device>::forward(ctx, tensors, scalars, norm_squared);
}

/// *out = the sum of the squares of `values`; out is of the device.
template <class Device, class F>
void sum_of_squares(Context<Device>& ctx, Vector<F> values, double* out) {
  AdamWStep<Device>::sum_of_squares(ctx, Vector<const std::remove_const_t<F>>(values), out);
}

template <>
struct AdamWStep<cpu> {
  template <class W, class F>
  static void forward(Context<cpu>& ctx, const AdamWTensors<W, F>& t, const AdamWScalars& s,
                      const double* norm_squared) {
    AdamWFactors<F> by(s);
    if (!by.clip(*norm_squared) || (s.loss && !is_finite(*s.loss))) return;
    for_pieces(ctx, t.weight.size(), step_piece, [&](Index first, Index count) {
      const F* gradient = t.gradient.data + first;
      alignas(64) F scaled[step_piece];
      if (by.coarse != 1) {
        map(scaled, count) = map(gradient, count) * by.coarse;
        gradient = scaled;
      }
      const auto g = map(gradient, count);
      auto m = map(t.m.data + first, count), v = map(t.v.data + first, count);
      m = by.beta1 * m + by.gain1 * g;
      v = by.beta2 * v + (by.root2 * g).square();
      const auto step = [&](auto p) { p = by.keep * p - by.rate * m / (v.sqrt() * by.root + by.eps); };
      W* const weight = t.weight.data + first;
      if constexpr (std::is_same_v<W, F>) {
        step(map(weight, count));
      } else {
        alignas(64) F masters[step_piece];
        join(weight, t.low.data + first, masters, count);
        step(map(masters, count));
        split(masters, weight, t.low.data + first, count);
      }
    });
  }

  template <class F>
  static void sum_of_squares(Context<cpu>& ctx, Vector<const F> values, double* out) {
    ArenaScope scope(ctx.arena());
    const Vector<double> sums = scratch(ctx, values, out);
    for_pieces(ctx, values.size(), sum_piece,
               [&](Index first, Index count) { sums[first / sum_piece] = squares(values.data + first, count); });
    *out = 0;
    for (Index i = 0; i < sums.size(); ++i) *out += sums[i];
  }

  /// Of sum_of_squares.
  template <class Ctx, class F>
  static Vector<double> scratch(Ctx& ctx, Vector<const F> values, double*) {
    return ctx.arena().template tensor<double>(ceil_div(values.size(), sum_piece));
  }

 private:
  /// Fixed, so that results do not depend on the threads; the five arrays of a step's piece fit a first-level cache.
  static constexpr Index step_piece = 1 << 11, sum_piece = 1 << 14;

  /// 32 partial sums, then their sum.
  template <class F>
  static double squares(const F* from, Index count) {
    constexpr Index block = 32;
    double sums[block] = {}, total = 0;
    const auto add = [&](Index first, Index n) __attribute__((always_inline)) {
      for (Index k = 0; k < n; ++k)
        sums[k] += static_cast<double>(from[first + k]) * static_cast<double>(from[first + k]);
    };
    const Index whole = count / block * block;
    for (Index i = 0; i < whole; i += block) add(i, block);
    add(whole, count - whole);
    for (const double sum : sums) total += sum;
    return total;
  }

  /// Halves to masters, and back.
  static void join(const bf16* nearest, const std::uint16_t* low, float* to, Index count) {
    for_blocks(count, [=](Index i) { to[i] = static_cast<float>(SplitFloat(nearest[i], low[i])); });
  }
  static void split(const float* from, bf16* nearest, std::uint16_t* low, Index count) {
    for_blocks(count, [=](Index i) {
      const SplitFloat halves(from[i]);
      nearest[i] = halves.nearest;
      low[i] = halves.low;
    });
  }

  /// f(i) for i below count. A loop of constant length is one that compilers vectorise at -O2.
  template <class Body>
  [[gnu::always_inline]] static void for_blocks(Index count, Body f) {
    constexpr Index block = 64;
    Index i = 0;
    for (; i + block <= count; i += block)
      for (Index k = 0; k < block; ++k) f(i + k);
    for (; i < count; ++i) f(i);
  }

  template <class F>
  static auto map(F* data, Index count) {
    using Plain = Eigen::Array<std::remove_const_t<F>, Eigen::Dynamic, 1>;
    return Eigen::Map<std::conditional_t<std::is_const_v<F>, const Plain, Plain>>(data, count);
  }

  /// f(first, count) for each piece. Threads take 16 pieces at a time.
  template <class F>
  static void for_pieces(Context<cpu>& ctx, Index size, Index piece, F&& f) {
    const Index at_once = 16 * piece;
    ctx.parallel_for(ceil_div(size, at_once), [&](Index i, int) {
      const Index end = std::min(size, (i + 1) * at_once);
      for (Index first = i * at_once; first < end; first += piece) f(first, std::min(piece, end - first));
    });
  }
};

}  // namespace zamba
