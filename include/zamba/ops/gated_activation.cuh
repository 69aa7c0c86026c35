// SPDX-License-Identifier: MIT
// gated_activation on CUDA, forward; equations and shapes in gated_activation.hpp.
//
// Numeric contract: computed in compute_t, rounded once when written; erf and exp are CUDA's own, within 2 units in the
// last place.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/ops/gated_activation.hpp>

namespace zamba {

namespace detail {

template <class A>
struct GateElement {
  using F = compute_t<A>;
  Activation activation;
  Matrix<const A> gate, up;
  Matrix<A> out;

  __device__ void operator()(Index t, Index j) const {
    const F x = F(gate(t, j));
    const F share =
        activation == Activation::gelu ? F(0.5) * ::erfc(x * F(-0.70710678118654752440)) : F(1) / (F(1) + ::exp(-x));
    out(t, j) = A(x * share * F(up(t, j)));
  }
};

}  // namespace detail

template <>
struct GatedActivation<cuda> {
  template <class A>
  static void forward(Context<cuda>& ctx, Activation activation, Matrix<const A> gate, Matrix<const A> up,
                      Matrix<A> out) {
    detail::for_elements(ctx, out.rows(), out.cols(), detail::GateElement<A>{activation, gate, up, out},
                         "gated_activation");
  }
};

}  // namespace zamba
