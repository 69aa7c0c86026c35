// SPDX-License-Identifier: MIT
// load_weights: a piece of a row of weights in a register, whatever the weights are stored as.
#pragma once

#include <zamba/kernel/simd.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Weights (o, k) to (o, k + count - 1) as A, zeros beyond. The row `ahead` rows further on is asked for, into the
/// second-level cache.
template <class A, Index ahead = 0, class W>
[[gnu::always_inline]] inline Pack<A> load_weights(const Matrix<W>& weight, Index o, Index k, Index count) {
  const W* from = weight.data + o * weight.stride[0] + k;
  if constexpr (ahead > 0) __builtin_prefetch(from + ahead * weight.stride[0], 0, 2);
  return load_as<A>(from, count);
}

/// The same of another view of weights, as WeightTraits::View (weight.hpp) says.
template <class A, Index ahead = 0, class View>
[[gnu::always_inline]] inline Pack<A> load_weights(const View& weight, Index o, Index k, Index count) {
  return weight.template load<A>(o, k, count);
}

}  // namespace zamba::kernel
