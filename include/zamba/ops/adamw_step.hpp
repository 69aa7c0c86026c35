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
// that norm is not finite, or v could not hold its square after clipping, nothing is changed.
//
// Numeric contract: elementwise arithmetic in compute_t (float, or double for double); the squares are summed in double
// over pieces of 2^14 elements, and the pieces in order. Bit-equal for any number of threads, where the arrays of a
// step are aligned to 64 bytes, as those of models and gradients are. Weights in bf16 have a master copy in float,
// which is stepped; the weight is its rounding.
#pragma once

#include <algorithm>
#include <cmath>
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
  double decay;       // weight decay of this parameter, 0 for none
  double clip_norm;   // 0: no clipping
  Index step_number;  // t, from 1
};

/// What scales gradients of this norm.
inline double clip_factor(double norm, double clip_norm) {
  return clip_norm > 0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;
}

/// Whether gradients of this norm may be stepped with: it is finite and, clipped, its square is no overflow in F.
template <class F>
bool can_step(double norm, double clip_norm) {
  if (!is_finite(norm)) return false;
  const double clipped = norm * clip_factor(norm, clip_norm) * (1 + 1e-6);  // room for the roundings of F
  return clipped * clipped <= static_cast<double>(std::numeric_limits<F>::max());
}

/// The tensors of one parameter, (n) each. W: the stored type; where it is F, there is no master copy.
template <class W, class F>
struct AdamWTensors {
  Vector<W> weight;
  Vector<F> master;
  Vector<const F> gradient;
  Vector<F> m, v;
};

/// Steps one parameter. norm_squared: one element, of all gradients.
template <class Device, class W, class F>
void adamw_step(Context<Device>& ctx, const AdamWTensors<W, F>& tensors, const AdamWScalars& scalars,
                const double* norm_squared) {
  if constexpr (checked) {
    const kernel::Door door{"adamw_step"};
    const Index n = tensors.weight.size();
    door.shape("master", tensors.master, std::is_same_v<W, F> ? 0 : n);
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
    const double steps = static_cast<double>(s.step_number);
    const double norm = std::sqrt(*norm_squared);
    if (!can_step<F>(norm, s.clip_norm)) return;
    // In two factors where it is tiny, because one alone would lose its digits among the least floats.
    const double clip = clip_factor(norm, s.clip_norm), coarse = clip < 0x1p-100 ? 0x1p-100 : 1, fine = clip / coarse;
    const F beta1 = static_cast<F>(s.beta1), beta2 = static_cast<F>(s.beta2), eps = static_cast<F>(s.eps);
    const F gain1 = static_cast<F>((1 - s.beta1) * fine), root2 = static_cast<F>(std::sqrt(1 - s.beta2) * fine);
    const F keep = static_cast<F>(1 - s.learning_rate * s.decay);
    const F rate = static_cast<F>(s.learning_rate / (1 - std::pow(s.beta1, steps)));
    const F root = static_cast<F>(1 / std::sqrt(1 - std::pow(s.beta2, steps)));
    for_pieces(ctx, t.weight.size(), step_piece, [&](Index first, Index count) {
      const F* gradient = t.gradient.data + first;
      alignas(64) F scaled[step_piece];
      if (coarse != 1) {
        map(scaled, count) = map(gradient, count) * static_cast<F>(coarse);
        gradient = scaled;
      }
      const auto g = map(gradient, count);
      auto m = map(t.m.data + first, count), v = map(t.v.data + first, count);
      m = beta1 * m + gain1 * g;
      v = beta2 * v + (root2 * g).square();
      const auto step = [&](auto p) { p = keep * p - rate * m / (v.sqrt() * root + eps); };
      if constexpr (std::is_same_v<W, F>) {
        step(map(t.weight.data + first, count));
      } else {
        step(map(t.master.data + first, count));
        round(t.master.data + first, t.weight.data + first, count);
      }
    });
  }

  template <class F>
  static void sum_of_squares(Context<cpu>& ctx, Vector<const F> values, double* out) {
    ArenaScope scope(ctx.arena());
    const auto sums = ctx.arena().template tensor<double>(ceil_div(values.size(), sum_piece));
    for_pieces(ctx, values.size(), sum_piece,
               [&](Index first, Index count) { sums[first / sum_piece] = squares(values.data + first, count); });
    *out = 0;
    for (Index i = 0; i < sums.size(); ++i) *out += sums[i];
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

  /// A loop of constant length is one that compilers vectorise at -O2.
  template <class F, class W>
  static void round(const F* from, W* to, Index count) {
    constexpr Index block = 64;
    Index i = 0;
    for (; i + block <= count; i += block)
      for (Index k = 0; k < block; ++k) to[i + k] = static_cast<W>(from[i + k]);
    for (; i < count; ++i) to[i] = static_cast<W>(from[i]);
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
