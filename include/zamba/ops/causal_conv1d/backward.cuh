// SPDX-License-Identifier: MIT
// The backward pass of causal_conv1d on CUDA for a fixed K: one pass over the inputs with two sliding windows in
// registers. A thread takes 16 bytes of neighbouring channels along a group of neighbouring tokens, which cp.async
// brings to a ring in shared memory some tokens ahead; token t gives p_t from the window of x and with it
//
//   d_p_t                          joins the window of d_p
//   d_weight[:, j] += d_p_t x_{t-(K-1)+j}, d_bias += d_p_t          sums of the group, in registers
//   d_x_{t-(K-1)} = sum_j weight[:, j] * d_p_{t-j}
//
// A group runs K - 1 tokens on into the next one, or beyond its row's end, for the last of its d_x; these add nothing
// to its sums. The ring goes on from a row to the next: only the windows begin anew. Order of sums: tokens of a group,
// then the groups, whose length depends on the extents alone (kernel/add_parts.cuh).
#pragma once

#include <type_traits>

#include <zamba/kernel/async_copy.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d/step.cuh>
#include <zamba/sequences.hpp>

namespace zamba::kernel {

/// Blocks of a multiprocessor are as many as there are registers for: windows, sums and weights of eight channels take
/// some 240 of them.
template <class A_, int K_>
struct ConvGradientTraits : CausalConv1dTraits<A_, K_, vector_width<A_>> {
  static constexpr int blocks = 8;
  static constexpr int ahead = 6;  // tokens that are there or on their way
};

/// x and d_out of the tokens [first, end) in turn, for a thread's channels from c on: a ring of those that are there or
/// on their way. A thread reads what it has copied itself.
template <class Traits>
class ConvGradientInputs {
 public:
  using A = typename Traits::A;
  using F = typename Traits::F;
  static constexpr int width = Traits::width, ahead = Traits::ahead;
  using Memory = AlignedVector<A, width>[ahead][2][Traits::threads];

  __device__ ConvGradientInputs(Memory& memory, const Matrix<const A>& x, const Matrix<const A>& d_out, Index first,
                                Index end, Index c)
      : memory_(memory),
        x_(&x(first, c)),
        d_out_(&d_out(first, c)),
        x_stride_(x.stride[0]),
        d_out_stride_(d_out.stride[0]),
        left_(static_cast<int>(end - first)) {
#pragma unroll
    for (int k = 0; k < ahead; ++k) fetch(k);
  }

  /// Those of the next token.
  __device__ void take(F (&x)[width], F (&d_out)[width]) {
    copy_async_wait<ahead - 1>();
    memory_[slot_][0][threadIdx.x].unpack(x);
    memory_[slot_][1][threadIdx.x].unpack(d_out);
    fetch(slot_);
    slot_ = slot_ + 1 < ahead ? slot_ + 1 : 0;
  }

 private:
  /// One group of copies, though there may be none.
  __device__ void fetch(int slot) {
    if (left_-- > 0) {
      copy_async(&memory_[slot][0][threadIdx.x], x_, true);
      copy_async(&memory_[slot][1][threadIdx.x], d_out_, true);
    }
    copy_async_commit();
    x_ += x_stride_;
    d_out_ += d_out_stride_;
  }

  Memory& memory_;
  const A *x_, *d_out_;  // of the next token to fetch
  Index x_stride_, d_out_stride_;
  int left_, slot_ = 0;
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
  constexpr int width = Traits::width, past = Traits::past;
  launch_dependents();
  const Index c = (Index{blockIdx.x % tiles} * Traits::threads + threadIdx.x) * width;
  if (c >= d_x.cols()) return grid_dependency_wait();
  const Index group = blockIdx.x / tiles, first = group * group_size;
  const Index last = ::min(first + group_size, sequences.tokens);
  const ConvFilter<Traits> filter(weight, bias, c);

  grid_dependency_wait();
  __shared__ typename ConvGradientInputs<Traits>::Memory memory;
  ConvGradientInputs<Traits> inputs(memory, x, d_out, first, ::min(last + past, sequences.tokens), c);
  ConvGradientStep<Traits> at;
  A* next_d_x = &d_x(first, c);
  for (Index row = row_of(sequences, first); row < sequences.rows && sequences.begin(row) < last; ++row) {
    const Index begin = sequences.begin(row), length = sequences.length(row);
    const Index t = ::max(first - begin, Index{0}), end = ::min(last - begin, length);
    if (t >= end) continue;
    // Counted from t: tokens of the group, steps to its last d_x, and tokens that the row has for these.
    const int counted = static_cast<int>(end - t), steps = counted + past;
    const int there = static_cast<int>(::min(length, end + past) - t);
    begin_windows(at, x, state, sequences, row, t, c);
    // Inside: a token of the group, with K - 1 others before it.
    const auto move = [&](int step, auto is_inside) {
      constexpr bool inside = decltype(is_inside)::value;
      F input[width] = {}, d[width] = {}, result[width];
      if (inside || step < there) inputs.take(input, d);
      at.step(filter, input, d, inside || step < counted, result);
      if (!inside && step < past) return;
      if (!inside && d_state && step >= there) {  // the final state holds the input of this d_x
        F more[width];
        load_vector<width>(&d_state(row, step - there, c)).unpack(more);
#pragma unroll
        for (int i = 0; i < width; ++i) result[i] += more[i];
      }
      store_vector_streaming(next_d_x, AlignedVector<A, width>::pack(result));
      next_d_x += d_x.stride[0];
    };
    int step = 0;
#pragma unroll 1
    for (; step < past; ++step) move(step, std::false_type{});
#pragma unroll 1
    for (; step + past <= counted; step += past) {  // the windows are where they were
#pragma unroll
      for (int k = 0; k < past; ++k) move(step + k, std::true_type{});
    }
#pragma unroll 1
    for (; step < steps; ++step) move(step, std::false_type{});
  }
  copy_async_wait<0>();
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
