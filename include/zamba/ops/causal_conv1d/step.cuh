// SPDX-License-Identifier: MIT
// What the kernels of causal_conv1d on CUDA for a fixed K share: the filter of a thread's channels, and their window of
// the K - 1 inputs before a token.
#pragma once

#include <zamba/kernel/math.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

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

}  // namespace zamba::kernel
