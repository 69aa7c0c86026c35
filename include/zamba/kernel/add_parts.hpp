// SPDX-License-Identifier: MIT
// add_parts: gradients of what several tasks read, as B and C of a scan are read by all channels of a head or group.
#pragma once

#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// d_B and d_C (tokens, owners, N): each owner's sum of its `per_owner` parts, in order. partial (parts, tokens, 2 N):
/// a part of d_B, then of d_C.
template <class T>
void add_parts(Context<cpu>& ctx, Index per_owner, std::type_identity_t<Tensor<const T, 3>> partial, Tensor<T, 3> d_B,
               Tensor<T, 3> d_C) {
  const Index owners = d_B.shape[1], N = d_B.shape[2];
  ctx.parallel_for(d_B.shape[0], [&](Index token, int) {
    for (Index owner = 0; owner < owners; ++owner)
      for (Index n = 0; n < N; ++n) {
        T b = 0, c = 0;
        for (Index part = owner * per_owner; part < (owner + 1) * per_owner; ++part) {
          b += partial(part, token, n);
          c += partial(part, token, N + n);
        }
        d_B(token, owner, n) = b;
        d_C(token, owner, n) = c;
      }
  });
}

}  // namespace zamba::kernel
