// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA for single tokens: the window of a row is its state, which moves by one input. A warp keeps the
// filter of its channels and goes over some rows, the next on its way while one is computed (kernel/single_tokens.cuh).
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/single_tokens.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d/step.cuh>
#include <zamba/sequences.hpp>

namespace zamba::kernel {

/// The channels [c, c + width) of single tokens of `rows_each` rows, at most SingleTokens::most_rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    causal_conv1d_token_kernel(Matrix<const typename Traits::A> x, Matrix<const typename Traits::F> weight,
                               Vector<const typename Traits::F> bias, Sequences sequences,
                               Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> out, unsigned tiles,
                               int rows_each) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width, past = Traits::past;
  launch_dependents();
  const Index c = (Index{blockIdx.x % tiles} * Traits::threads + threadIdx.x) * width;
  const bool there = c < out.cols();
  const ConvFilter<Traits> filter(weight, bias, there ? c : 0);
  const Index first = Index{blockIdx.x / tiles} * rows_each;
  if (state && there) {
#pragma unroll
    for (int j = 0; j < past; ++j) prefetch_to_cache(&state(first, j, c));
  }
  grid_dependency_wait();

  const SingleTokens rows(sequences, first, rows_each, static_cast<bool>(state));
  struct Operands {
    Index at;
    F window[past][width];
    AlignedVector<A, width> input;
  };
  const auto load = [&](int row) {
    Operands operands{};
    operands.at = rows.token(row);
    if (there) {
      load_conv_state<Traits>(state, first + row, c, rows.continued(row), operands.window);
      operands.input = load_vector<width>(&x(operands.at, c));
    }
    return operands;
  };
  rows.for_each(load, [&](int row, Operands& operands) {
    F input[width], result[width];
    operands.input.unpack(input);
    filter.step(operands.window, input, result);
    if (!there) return;
    store_vector(&out(operands.at, c), result);
    if (state) {
#pragma unroll
      for (int slot = 0; slot < past; ++slot) store_vector(&state(first + row, slot, c), operands.window[slot]);
    }
  });
}

}  // namespace zamba::kernel
