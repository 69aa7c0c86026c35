// SPDX-License-Identifier: MIT
// What CUDA needs of Scaled<Code>: the products of linear, here a thread for each of them.
#pragma once

#include <zamba/kernel/elementwise.cuh>
#include <zamba/ops/linear.cuh>

#include <tests/support/scaled.hpp>

namespace zamba_test {

template <class A, class Weights, class F>
struct ScaledProduct {
  zamba::Matrix<const A> x;
  Weights weight;
  zamba::Matrix<A> y;
  zamba::Matrix<const A> residual;
  zamba::Vector<const F> bias;

  __device__ void operator()(Index t, Index o) const {
    F sum = bias ? bias[o] : F(0);
    for (Index k = 0; k < x.cols(); ++k) sum += F(x(t, k)) * F(weight(o, k));
    y(t, o) = A(residual ? sum + F(residual(t, o)) : sum);
  }
};

}  // namespace zamba_test

template <class A, class Code, int Rank>
struct zamba::kernel::LinearKernels<A, zamba_test::ScaledView<Code, Rank>> {
  using F = compute_t<A>;

  template <class Weights>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, const Weights& weight, Matrix<A> y,
                      Matrix<const A> residual, Vector<const F> bias) {
    using Product = zamba_test::ScaledProduct<A, Weights, F>;
    for_elements(ctx, y.rows(), y.cols(), Product{x, weight, y, residual, bias}, "linear");
  }
  template <class Weights>
  static void forward_heads(Context<cuda>& ctx, Tensor<const A, 3> x, const Weights& weight, Tensor<A, 3> y) {
    for (Index h = 0; h < weight.rows(); ++h) forward(ctx, head_of(x, h), weight[h], head_of(y, h), {}, {});
  }
};
