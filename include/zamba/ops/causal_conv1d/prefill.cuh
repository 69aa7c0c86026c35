// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA for rows of some tokens: a sliding window in registers. A thread takes neighbouring channels
// along a group of neighbouring tokens, a few loads ahead of the window.
//
// Groups are as long as lets all blocks be on the GPU at once: longer ones read fewer inputs twice, and none waits for
// another to end. Only the inputs before a row's first token come from its state, so whoever takes that token takes the
// K - 1 first ones, and rewrites the state as soon as it was read.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d/step.cuh>
#include <zamba/sequences.hpp>

namespace zamba::kernel {

/// The state after a row: its last K - 1 inputs, those of the past among them where the row is shorter. inputs(i): of
/// token i of the row; window: the inputs before its first.
template <class Traits, class Inputs>
__device__ void store_conv_state(const Tensor<typename Traits::F, 3>& state, Index row, Index c, Index length,
                                 const Inputs& inputs,
                                 const typename Traits::F (&window)[Traits::past][Traits::width]) {
  constexpr int width = Traits::width, past = Traits::past;
#pragma unroll
  for (int slot = 0; slot < past; ++slot) {
    const Index from = length - past + slot;
    typename Traits::F kept[width];
    if (from >= 0) {
      inputs(from).unpack(kept);
    } else {
#pragma unroll
      for (int j = slot + 1; j < past; ++j)
        if (j == from + past) {
#pragma unroll
          for (int i = 0; i < width; ++i) kept[i] = window[j][i];
        }
    }
    store_vector(&state(row, slot, c), kept);
  }
}

/// The channels [c, c + width) of the tokens of a group: blocks for the tiles of channels of a group, then the next.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    causal_conv1d_kernel(Matrix<const typename Traits::A> x, Matrix<const typename Traits::F> weight,
                         Vector<const typename Traits::F> bias, Sequences sequences,
                         Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> out, unsigned tiles,
                         Index group) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width, past = Traits::past, ahead = Traits::ahead;
  launch_dependents();
  const Index c = (Index{blockIdx.x % tiles} * Traits::threads + threadIdx.x) * width;
  if (c >= out.cols()) return grid_dependency_wait();
  const Index first = blockIdx.x / tiles * group, last = ::min(first + group, sequences.tokens);
  const ConvFilter<Traits> filter(weight, bias, c);

  grid_dependency_wait();
  for (Index row = row_of(sequences, first); row < sequences.rows && sequences.begin(row) < last; ++row) {
    const Index begin = sequences.begin(row), length = sequences.length(row);
    // Tokens of the row, counted from its first: those of this group, but the first K - 1 go with the first.
    const bool begins = begin >= first;
    Index t = begins ? 0 : ::max(first - begin, Index{past});
    const Index end = ::min(length, begins ? ::max(last - begin, Index{past}) : last - begin);
    if (t >= end) continue;
    const auto inputs = [&](Index token) { return load_vector<width>(&x(begin + token, c)); };
    const auto load = [&](Index token) { return token < end ? inputs(token) : AlignedVector<A, width>{}; };
    AlignedVector<A, width> coming[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) coming[k] = load(t + k);
    F window[past][width];  // the inputs before token t
    if (t > 0) {
#pragma unroll
      for (int j = 0; j < past; ++j) inputs(t - past + j).unpack(window[j]);
    } else {
      load_conv_state<Traits>(state, row, c, state && sequences.start(row) > 0, window);
      if (state) store_conv_state<Traits>(state, row, c, length, inputs, window);
    }
    for (; t < end; t += ahead) {
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        F input[width], result[width];
        coming[k].unpack(input);
        coming[k] = load(t + k + ahead);
        filter.step(window, input, result);
        if (t + k < end) store_vector(&out(begin + t + k, c), result);
      }
    }
  }
}

}  // namespace zamba::kernel
