// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA, forward; equations and shapes in causal_conv1d.hpp.
//
// Bound by memory, so for the usual K = 4 a thread takes 16 bytes of neighbouring channels, where rows are aligned to
// them, and goes along a group of neighbouring tokens with the K - 1 inputs before in registers, a few loads ahead.
// Groups are as long as lets all blocks be on the GPU at once: longer ones read fewer inputs twice, and none waits for
// another to end. Only the inputs before a row's first token come from its state, so whoever takes that token takes the
// K - 1 first ones, and rewrites the state as soon as it was read. Of single tokens a thread takes those of some rows,
// without a search. Other K go element by element.
//
// Numeric contract: as on the CPU, one sum over j in order, in compute_t; rounded once when written. In float the
// sigmoid of p is within (3 + |p|) 1e-7 of its value.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/math.cuh>
#include <zamba/kernel/single_tokens.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d.hpp>

namespace zamba {

namespace kernel {

/// K_ inputs to an output; a thread has Width_ neighbouring channels, one or 16 bytes of them. Blocks of one warp leave
/// few threads without channels.
template <class A_, int K_, int Width_>
struct CausalConv1dTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int K = K_, past = K - 1, width = Width_;
  static constexpr int threads = 32, blocks = 16;  // of a multiprocessor, at least
  static constexpr int ahead = 4;                  // tokens whose loads are under way together
};

/// Weights and bias of the channels [c, c + width).
template <class Traits>
struct ConvFilter {
  using F = typename Traits::F;
  static constexpr int K = Traits::K, past = Traits::past, width = Traits::width;
  F w[width][K], b[width];

  __device__ ConvFilter(Matrix<const F> weight, Vector<const F> bias, Index c) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const F* const from = &weight(c + i, 0);
      if constexpr (width > 1) {
        load_vector_readonly<K>(from).unpack(w[i]);
      } else {
#pragma unroll
        for (int j = 0; j < K; ++j) w[i][j] = from[j];
      }
      b[i] = bias ? bias[c + i] : F(0);
    }
  }

  /// The output of an input and those before it, which it joins.
  __device__ void step(F (&window)[past][width], const F (&input)[width], F (&result)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      F p = b[i];
#pragma unroll
      for (int j = 0; j < past; ++j) p = ::fma(w[i][j], window[j][i], p);
      result[i] = silu(::fma(w[i][past], input[i], p));
#pragma unroll
      for (int j = 0; j + 1 < past; ++j) window[j][i] = window[j + 1][i];
      window[past - 1][i] = input[i];
    }
  }
};

/// The K - 1 inputs before a row's first token in the channels [c, c + width).
template <class Traits>
__device__ void load_conv_state(const Tensor<typename Traits::F, 3>& state, Index row, Index c, bool continued,
                                typename Traits::F (&window)[Traits::past][Traits::width]) {
#pragma unroll
  for (int j = 0; j < Traits::past; ++j) {
    if (continued) {
      load_vector<Traits::width>(&state(row, j, c)).unpack(window[j]);
    } else {
#pragma unroll
      for (int i = 0; i < Traits::width; ++i) window[j][i] = 0;
    }
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
      if (state) {
        // The last K - 1 inputs, the past among them where the row is shorter.
#pragma unroll
        for (int slot = 0; slot < past; ++slot) {
          const Index from = length - past + slot;
          F kept[width];
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

/// The channels [c, c + width) of single tokens of `rows_each` rows, at most one a lane, the next on its way while one
/// is computed.
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

/// The inputs of one channel, those of the past included.
template <class A_>
struct ConvInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x;
  Sequences sequences;
  Tensor<F, 3> state;
  Index K;

  /// Input i of a row, counted from its first token in x; negative: of its past.
  __device__ F operator()(Index row, Index i, Index c) const {
    if (i >= 0) return F(x(sequences.begin(row) + i, c));
    return state && sequences.start(row) > 0 ? state(row, K - 1 + i, c) : F(0);
  }
};

/// An output, from any number of inputs.
template <class A_>
struct ConvolveElement {
  using A = A_;
  using F = compute_t<A>;
  ConvInput<A> in;
  Matrix<const F> weight;
  Vector<const F> bias;
  Matrix<A> out;

  __device__ void operator()(Index token, Index c) const {
    const Index row = row_of(in.sequences, token), t = token - in.sequences.begin(row);
    F p = bias ? bias[c] : F(0);
    for (Index j = 0; j < in.K; ++j) p = ::fma(weight(c, j), in(row, t - (in.K - 1) + j, c), p);
    out(token, c) = A(silu(p));
  }
};

/// The state after a row's tokens: its last K - 1 inputs, oldest first, so that what is left of a longer past moves
/// before it is overwritten.
template <class A>
struct NextConvState {
  ConvInput<A> in;

  __device__ void operator()(Index row, Index c) const {
    const Index length = in.sequences.length(row);
    if (length == 0) return;
    for (Index slot = 0; slot < in.K - 1; ++slot) in.state(row, slot, c) = in(row, length - (in.K - 1) + slot, c);
  }
};

}  // namespace kernel

template <>
struct CausalConv1d<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const F> weight, Vector<const F> bias,
                      const Sequences& sequences, Tensor<F, 3> state, Matrix<A> out) {
    if (sequences.tokens == 0) return;
    constexpr Index K = 4;
    if (weight.cols() == K) {
      constexpr Index width = kernel::vector_width<A>;
      const bool in_pieces = kernel::in_vectors(x) && kernel::in_vectors(out) && kernel::in_vectors(weight) &&
                             (!state || kernel::aligned(state, kernel::vector_width<F>));
      return in_pieces ? launch<kernel::CausalConv1dTraits<A, K, width>>(ctx, x, weight, bias, sequences, state, out)
                       : launch<kernel::CausalConv1dTraits<A, K, 1>>(ctx, x, weight, bias, sequences, state, out);
    }
    const kernel::ConvInput<A> in{x, sequences, state, weight.cols()};
    kernel::for_elements(ctx, sequences.tokens, x.cols(), kernel::ConvolveElement<A>{in, weight, bias, out},
                         "causal_conv1d");
    if (state)
      kernel::for_elements(ctx, sequences.rows, x.cols(), kernel::NextConvState<A>{in}, "causal_conv1d: state");
  }

 private:
  /// The most tokens of a block: longer groups read fewer inputs twice, shorter ones end more evenly.
  static constexpr Index most_tokens = 256;

  template <class Traits, class A, class F>
  static void launch(Context<cuda>& ctx, Matrix<const A> x, Matrix<const F> weight, Vector<const F> bias,
                     const Sequences& sequences, Tensor<F, 3> state, Matrix<A> out) {
    const Index tiles = ceil_div(x.cols(), Index{Traits::width} * Traits::threads);
    // Blocks of a tile that are on the GPU at once.
    const Index room = std::max<Index>(Traits::blocks * ctx.multiprocessors() / tiles, 1);
    const auto queue = [&](auto* kernel, Index count, auto each) {
      const auto blocks = static_cast<unsigned>(ceil_div(count, each) * tiles);
      kernel::launch(ctx, "causal_conv1d", kernel, blocks, Traits::threads, 0, x, weight, bias, sequences, state, out,
                     static_cast<unsigned>(tiles), each);
    };
    if (sequences.longest <= 1) {
      const Index each = std::clamp<Index>(ceil_div(sequences.rows, room), 1, Traits::threads);
      return queue(kernel::causal_conv1d_token_kernel<Traits>, sequences.rows, static_cast<int>(each));
    }
    // Groups for a whole number of times as many.
    const Index rounds = ceil_div(sequences.tokens, room * most_tokens);
    queue(kernel::causal_conv1d_kernel<Traits>, sequences.tokens, ceil_div(sequences.tokens, rounds * room));
  }
};

}  // namespace zamba
