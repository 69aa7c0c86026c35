// SPDX-License-Identifier: MIT
// add: to += from, elementwise. Joins two gradients of one tensor.
#pragma once

#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/op.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(Add, "add.cuh");

/// from, to (n, d).
template <class Device, class A>
void add(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> from, Matrix<A> to) {
  if constexpr (checked) {
    const kernel::Door door{"add"};
    door.shape("from", from, to.rows(), to.cols());
  }
  Add<Device>::forward(ctx, from, to);
}

template <>
struct Add<cpu> {
  template <class A>
  static void forward(Context<cpu>& ctx, Matrix<const A> from, Matrix<A> to) {
    ctx.parallel_for(to.rows(), [&](Index row, int) {
      const A* source = from[row].data;
      A* target = to[row].data;
      for (Index i = 0; i < to.cols(); ++i) target[i] += source[i];
    });
  }
};

}  // namespace zamba
