// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA, forward; equations and shapes in causal_conv1d.hpp.
//
// Bound by memory, so for the usual K = 4 a thread takes 16 bytes of neighbouring channels, where rows are aligned to
// them: causal_conv1d/prefill.cuh for rows of some tokens, causal_conv1d/decode.cuh for single ones. Other K go element
// by element, causal_conv1d/any_width.cuh.
//
// Numeric contract: as on the CPU, one sum over j in order, in compute_t; rounded once when written. In float the
// sigmoid of p is within (3 + |p|) 1e-7 of its value.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d.hpp>
#include <zamba/ops/causal_conv1d/any_width.cuh>
#include <zamba/ops/causal_conv1d/decode.cuh>
#include <zamba/ops/causal_conv1d/prefill.cuh>

namespace zamba {

template <>
struct CausalConv1d<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const F> weight, Vector<const F> bias,
                      const Sequences& sequences, Tensor<F, 3> state, Matrix<A> out) {
    if (sequences.tokens == 0) return;
    constexpr Index K = 4;
    if (weight.cols() == K) {
      constexpr Index width = kernel::vector_width<A>;
      const bool in_vectors = kernel::in_vectors(x) && kernel::in_vectors(out) && kernel::in_vectors(weight) &&
                              (!state || kernel::aligned(state, kernel::vector_width<F>));
      return in_vectors ? launch<kernel::CausalConv1dTraits<A, K, width>>(ctx, x, weight, bias, sequences, state, out)
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
      const Index each = std::clamp<Index>(ceil_div(sequences.rows, room), 1, kernel::SingleTokens::most_rows);
      return queue(kernel::causal_conv1d_token_kernel<Traits>, sequences.rows, static_cast<int>(each));
    }
    // Groups for a whole number of times as many.
    const Index rounds = ceil_div(sequences.tokens, room * most_tokens);
    queue(kernel::causal_conv1d_kernel<Traits>, sequences.tokens, ceil_div(sequences.tokens, rounds * room));
  }
};

}  // namespace zamba
