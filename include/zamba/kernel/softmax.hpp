// SPDX-License-Identifier: MIT
// The steps of a softmax over n contiguous numbers, a register at a time, in an order that n alone fixes.
#pragma once

#include <algorithm>

#include <zamba/device.hpp>
#include <zamba/kernel/simd.hpp>

namespace zamba::kernel {

/// to = factor * from
template <class A>
void scale(const A* from, A factor, Index n, A* to) {
  for_packs<A>(n, [&](Index c, auto count) { store(to + c, Pack<A>(load(from + c, count) * factor), count); });
}

/// The largest of n >= 1 numbers.
template <class A>
A largest(const A* s, Index n) {
  Pack<A> most = broadcast(s[0]);
  Index i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    const Pack<A> x = load(s + i);
    most = x > most ? x : most;
  }
  A maximum = s[0];
  for (Index lane = 0; lane < lanes<A>; ++lane) maximum = std::max(maximum, most[lane]);
  for (; i < n; ++i) maximum = std::max(maximum, s[i]);
  return maximum;
}

/// s = exp(s - shift); returns the sum.
template <class A>
A exponentials(A* s, A shift, Index n) {
  Pack<A> total = zeros<A>();
  Index i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    const Pack<A> e = exp<A>(load(s + i) - shift);
    store(s + i, e);
    total += e;
  }
  if (i < n) {
    store(s + i, exp<A>(load(s + i, n - i) - shift), n - i);
    total += load(s + i, n - i);
  }
  return sum<A>(total);
}

}  // namespace zamba::kernel
