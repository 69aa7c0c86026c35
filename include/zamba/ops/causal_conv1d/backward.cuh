// SPDX-License-Identifier: MIT
// The backward pass of causal_conv1d on CUDA for a fixed K: one pass over the inputs with two sliding windows in
// registers. A thread takes neighbouring channels along a group of neighbouring tokens, some loads ahead; token t gives
// p_t from the window of x and with it
//
//   d_p_t                          joins the window of d_p
//   d_weight[:, j] += d_p_t x_{t-(K-1)+j}, d_bias += d_p_t          sums of the group, in registers
//   d_x_{t-(K-1)} = sum_j weight[:, j] * d_p_{t-j}
//
// A group runs K - 1 tokens on into the next one, or beyond its row's end, for the last of its d_x; these add nothing
// to its sums. Their order: tokens of a group, then groups, whose length depends on the extents alone.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d/step.cuh>
#include <zamba/sequences.hpp>

namespace zamba::kernel {

/// A thread has Width_ neighbouring channels, one or four: windows, sums and loads of four leave a multiprocessor the
/// registers for 12 warps.
template <class A_, int K_, int Width_>
struct ConvGradientTraits : CausalConv1dTraits<A_, K_, Width_> {
  static constexpr int blocks = 12;
  static constexpr int ahead = sizeof(A_) == 2 ? 6 : 3;
};

/// The windows of a thread and its sums.
template <class Traits>
struct ConvGradientStep {
  using F = typename Traits::F;
  static constexpr int K = Traits::K, past = Traits::past, width = Traits::width;
  F x[past][width], d_p[past][width];  // of the K - 1 tokens before t, oldest first
  F d_w[width][K] = {}, d_b[width] = {};

  /// Moves by one token: d_x of that K - 1 before it. counted: whether it adds to the sums.
  __device__ void step(const ConvFilter<Traits>& filter, const F (&input)[width], const F (&d_out)[width], bool counted,
                       F (&d_x)[width]) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      F p = filter.b[i];
#pragma unroll
      for (int j = 0; j < past; ++j) p = ::fma(filter.w[i][j], x[j][i], p);
      p = ::fma(filter.w[i][past], input[i], p);
      const F slope = silu_slope(p, sigmoid(p)), d = d_out[i] * slope;
      if (counted) {
#pragma unroll
        for (int j = 0; j < past; ++j) d_w[i][j] = ::fma(d, x[j][i], d_w[i][j]);
        d_w[i][past] = ::fma(d, input[i], d_w[i][past]);
        d_b[i] = ::fma(d_out[i], slope, d_b[i]);
      }
      d_x[i] = filter.w[i][0] * d;
#pragma unroll
      for (int j = 1; j < K; ++j) d_x[i] = ::fma(filter.w[i][j], d_p[past - j][i], d_x[i]);
#pragma unroll
      for (int j = 0; j + 1 < past; ++j) {
        x[j][i] = x[j + 1][i];
        d_p[j][i] = d_p[j + 1][i];
      }
      x[past - 1][i] = input[i];
      d_p[past - 1][i] = d;
    }
  }
};

/// The windows before token t of a row, in the channels [c, c + width).
template <class Traits>
__device__ void begin_windows(ConvGradientStep<Traits>& windows, const Matrix<const typename Traits::A>& x,
                              const Tensor<const typename Traits::F, 3>& state, const Sequences& sequences, Index row,
                              Index t, Index c) {
  constexpr int past = Traits::past, width = Traits::width;
#pragma unroll
  for (int j = 0; j < past; ++j) {
    const Index position = t - past + j;
#pragma unroll
    for (int i = 0; i < width; ++i) windows.x[j][i] = windows.d_p[j][i] = 0;
    if (position >= 0)
      load_vector<width>(&x(sequences.begin(row) + position, c)).unpack(windows.x[j]);
    else if (state && sequences.start(row) > 0)
      load_vector<width>(&state(row, past + position, c)).unpack(windows.x[j]);
  }
}

/// d_x of the tokens of a group in the channels [c, c + width), and their sums: partial (groups, K + 1, D) of d_weight,
/// transposed, and d_bias. Blocks for the tiles of channels of a group, then the next.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    causal_conv1d_gradient_kernel(Matrix<const typename Traits::A> d_out, Matrix<const typename Traits::A> x,
                                  Matrix<const typename Traits::F> weight, Vector<const typename Traits::F> bias,
                                  Sequences sequences, Tensor<const typename Traits::F, 3> state,
                                  Tensor<const typename Traits::F, 3> d_state, Matrix<typename Traits::A> d_x,
                                  Tensor<typename Traits::F, 3> partial, unsigned tiles, Index group_size) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width, past = Traits::past, ahead = Traits::ahead;
  launch_dependents();
  const Index c = (Index{blockIdx.x % tiles} * Traits::threads + threadIdx.x) * width;
  if (c >= d_x.cols()) return grid_dependency_wait();
  const Index group = blockIdx.x / tiles, first = group * group_size;
  const Index last = ::min(first + group_size, sequences.tokens);
  const ConvFilter<Traits> filter(weight, bias, c);

  grid_dependency_wait();
  ConvGradientStep<Traits> at;
  for (Index row = row_of(sequences, first); row < sequences.rows && sequences.begin(row) < last; ++row) {
    const Index begin = sequences.begin(row), length = sequences.length(row);
    const Index t = ::max(first - begin, Index{0}), end = ::min(last - begin, length);
    if (t >= end) continue;
    // Counted from t: tokens of the group, steps to its last d_x, and tokens that the row has for these.
    const int counted = static_cast<int>(end - t), steps = counted + past;
    const int there = static_cast<int>(::min(length, end + past) - t);
    // Pointers move on, so that no step of an unrolled loop has addresses of its own in registers.
    const A *next_x = &x(begin + t, c), *next_d_out = &d_out(begin + t, c);
    A* next_d_x = &d_x(begin + t, c);
    AlignedVector<A, width> inputs[ahead] = {}, d_outs[ahead] = {};
    const auto load = [&](int step, int k) {
      if (step < there) {
        inputs[k] = load_vector<width>(next_x);
        d_outs[k] = load_vector<width>(next_d_out);
      }
      next_x += x.stride[0];
      next_d_out += d_out.stride[0];
    };
    const auto store = [&](const F(&values)[width]) {
      store_vector(next_d_x, values);
      next_d_x += d_x.stride[0];
    };
    // Any step; the loads that are under way move up by one.
    const auto move = [&](int step) {
      F input[width], d[width], result[width];
      inputs[0].unpack(input);
      d_outs[0].unpack(d);
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (step >= there) input[i] = d[i] = 0;
#pragma unroll
      for (int k = 0; k + 1 < ahead; ++k) {
        inputs[k] = inputs[k + 1];
        d_outs[k] = d_outs[k + 1];
      }
      load(step + ahead, ahead - 1);
      at.step(filter, input, d, step < counted, result);
      if (step < past) return;
      if (d_state && step >= there) {  // beyond the row's end: the final state holds the input of this d_x
        F more[width];
        load_vector<width>(&d_state(row, step - there, c)).unpack(more);
#pragma unroll
        for (int i = 0; i < width; ++i) result[i] += more[i];
      }
      store(result);
    };
#pragma unroll
    for (int k = 0; k < ahead; ++k) load(k, k);
    begin_windows(at, x, state, sequences, row, t, c);
    int step = 0;
#pragma unroll 1
    for (; step < past; ++step) move(step);
#pragma unroll 1
    for (; step + ahead <= counted; step += ahead) {
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        F input[width], d[width], result[width];
        inputs[k].unpack(input);
        d_outs[k].unpack(d);
        load(step + k + ahead, k);
        at.step(filter, input, d, true, result);
        store(result);
      }
    }
#pragma unroll 1
    for (; step < steps; ++step) move(step);
  }
#pragma unroll
  for (int j = 0; j < Traits::K; ++j) {
    F sums[width];
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] = at.d_w[i][j];
    store_vector(&partial(group, j, c), sums);
  }
  store_vector(&partial(group, Traits::K, c), at.d_b);
}

}  // namespace zamba::kernel
