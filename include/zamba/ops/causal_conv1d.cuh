// SPDX-License-Identifier: MIT
// causal_conv1d on CUDA; equations and shapes in causal_conv1d.hpp.
//
// Bound by memory, so for the usual K = 4 a thread takes 16 bytes of neighbouring channels, where rows are aligned to
// them: causal_conv1d/prefill.cuh for rows of some tokens, causal_conv1d/decode.cuh for single ones; backwards four
// channels, causal_conv1d/backward.cuh. Other K go element by element, causal_conv1d/any_width.cuh and
// causal_conv1d/backward_any_width.cuh.
//
// Numeric contract: as on the CPU, one sum over j in order, in compute_t; rounded once when written. In float the
// sigmoid of p is within (3 + |p|) 1e-7 of its value. Backwards d_weight and d_bias are summed over the tokens of a
// group, then over groups, in orders that the extents fix.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/add_parts.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/causal_conv1d.hpp>
#include <zamba/ops/causal_conv1d/any_width.cuh>
#include <zamba/ops/causal_conv1d/backward.cuh>
#include <zamba/ops/causal_conv1d/backward_any_width.cuh>
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
    const kernel::ConvInput<A> in{x, weight, bias, sequences, state};
    kernel::for_elements(ctx, sequences.tokens, x.cols(), kernel::ConvolveElement<A>{in, out}, "causal_conv1d");
    if (state)
      kernel::for_elements(ctx, sequences.rows, x.cols(), kernel::NextConvState<A>{in, state}, "causal_conv1d: state");
  }

  template <class A, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const F> weight,
                       Vector<const F> bias, const Sequences& sequences, Tensor<const F, 3> initial_state,
                       Matrix<A> d_x, Matrix<F> d_weight, Vector<F> d_bias, Tensor<F, 3> d_state) {
    const Index tokens = sequences.tokens, D = x.cols(), K = weight.cols();
    if (tokens == 0) return;
    const Index group_size = tokens_of_group(tokens, D), groups = ceil_div(tokens, group_size);
    ArenaScope scope(ctx.arena());
    const Tensor<F, 3> partial =
        backward_scratch(ctx, d_out, x, weight, bias, sequences, initial_state, d_x, d_weight, d_bias, d_state);
    const kernel::ConvGradient<A> d_p{{x, weight, bias, sequences, initial_state}, d_out};
    const Tensor<const F, 3> d_final(d_state);
    const auto queue = [&]<class Traits>(Traits) {
      const Index tiles = ceil_div(D, Index{Traits::width} * Traits::threads);
      kernel::launch(ctx, kernel::overlap_for(tokens), "causal_conv1d_backward",
                     kernel::causal_conv1d_gradient_kernel<Traits>, static_cast<unsigned>(groups * tiles),
                     Traits::threads, 0, d_out, x, weight, bias, sequences, initial_state, d_final, d_x, partial,
                     static_cast<unsigned>(tiles), group_size);
    };
    constexpr int fixed = 4;
    if (K == fixed) {
      constexpr int wide = sizeof(A) == 8 ? 1 : 4;  // double is for proofs
      const auto fits = [](const auto& tensor) { return !tensor || kernel::aligned(tensor, wide); };
      if (D % wide == 0 && fits(x) && fits(d_out) && fits(d_x) && fits(weight) && fits(initial_state) && fits(d_final))
        queue(kernel::ConvGradientTraits<A, fixed, wide>{});
      else
        queue(kernel::ConvGradientTraits<A, fixed, 1>{});
    } else {
      kernel::for_elements(ctx, tokens, D, kernel::ConvInputGradient<A>{d_p, d_final, d_x}, "causal_conv1d_backward");
      kernel::for_elements(ctx, groups * (K + 1), D, kernel::ConvWeightGradient<A>{d_p, group_size, partial},
                           "causal_conv1d_backward: weight");
    }
    kernel::add_parts(ctx, Matrix<const F>(partial.data, groups, (K + 1) * D),
                      kernel::AddConvSums<F>{d_weight, d_bias}, "causal_conv1d_backward: groups");
    if (d_state && K > 1)
      kernel::for_elements(ctx, sequences.rows, D, kernel::ConvStateGradient<A>{d_p, d_state},
                           "causal_conv1d_backward: state");
  }

  /// (groups, K + 1, D): of d_weight, transposed, and d_bias.
  template <class Ctx, class A, class F>
  static Tensor<F, 3> backward_scratch(Ctx& ctx, Matrix<const A>, Matrix<const A> x, Matrix<const F> weight,
                                       Vector<const F>, const Sequences& sequences, Tensor<const F, 3>, Matrix<A>,
                                       Matrix<F>, Vector<F>, Tensor<F, 3>) {
    const Index tokens = sequences.tokens, D = x.cols();
    return ctx.arena().template tensor<F>(ceil_div(tokens, tokens_of_group(tokens, D)), weight.cols() + 1, D);
  }

 private:
  static Index tokens_of_group(Index tokens, Index D) {
    const Index groups_at_most = std::max<Index>(gradient_blocks / ceil_div(D, gradient_channels), 1);
    return std::max(least_group, ceil_div(tokens, groups_at_most));
  }
  /// The most tokens of a block: longer groups read fewer inputs twice, shorter ones end more evenly.
  static constexpr Index most_tokens = 256;
  /// Backwards, groups are as long as lets all blocks be at once on a GPU of 132 multiprocessors; fixed, because they
  /// make the order of sums.
  static constexpr Index gradient_blocks = 132 * 12, gradient_channels = 128, least_group = 16;

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
