// SPDX-License-Identifier: MIT
// The backward pass of rms_norm on CUDA. A block a position for the inputs' gradients; d_weight in two more kernels, a
// thread a column, over fixed groups of positions and then over the groups in order, so that no sum is atomic.
#pragma once

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

template <class Input_>
struct RmsNormGradientTraits {
  using Input = Input_;
  using A = typename Input::A;
  using F = typename Input::F;
  static constexpr int threads = 512;
  static constexpr int columns = 128;  // of d_weight in one block
};

/// d_v = rstd * (g - u * mean(g * u))
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_input_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                   Vector<const typename Traits::F> weight, Vector<const typename Traits::F> rstd) {
  using F = typename Traits::F;
  const Index width = in.width();
  for (Index i = blockIdx.x; i < d_out.rows(); i += gridDim.x) {
    const F scale = rstd[i];
    F product = 0;
    for (Index c = threadIdx.x; c < width; c += Traits::threads)
      product += weight[c] * F(d_out(i, c)) * (in.value(i, c) * scale);
    const F mean = block_sum<Traits::threads>(product) / F(width);
    for (Index c = threadIdx.x; c < width; c += Traits::threads)
      in.add_gradient(i, c, scale * (weight[c] * F(d_out(i, c)) - mean * (in.value(i, c) * scale)));
  }
}

/// partial (groups, width): each group's sum of d_out * v * rstd, positions in order.
template <class Traits>
__global__ void __launch_bounds__(Traits::columns)
    rms_norm_weight_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                    Vector<const typename Traits::F> rstd, Index group_size,
                                    Matrix<typename Traits::F> partial) {
  using F = typename Traits::F;
  const Index c = Index{blockIdx.x} * Traits::columns + threadIdx.x, group = blockIdx.y;
  if (c >= in.width()) return;
  const Index end = ::min(d_out.rows(), (group + 1) * group_size);
  F sum = 0;
  for (Index i = group * group_size; i < end; ++i) sum += F(d_out(i, c)) * (in.value(i, c) * rstd[i]);
  partial(group, c) = sum;
}

/// d_weight += the sum of partial (groups, width) over the groups, in order.
template <class F>
__global__ void add_groups_kernel(Matrix<const F> partial, Vector<F> d_weight) {
  const Index c = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= partial.cols()) return;
  F sum = d_weight[c];
  for (Index group = 0; group < partial.rows(); ++group) sum += partial(group, c);
  d_weight[c] = sum;
}

}  // namespace zamba::kernel
