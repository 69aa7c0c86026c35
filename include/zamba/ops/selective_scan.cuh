// SPDX-License-Identifier: MIT
// selective_scan on CUDA, forward; equations and shapes in selective_scan.hpp.
//
// Float and up to 32 states: ops/selective_scan/prefill.cuh for rows of some tokens, ops/selective_scan/decode.cuh for
// single ones. Double and more states: a thread a channel, ops/selective_scan/channelwise.cuh.
//
// Numeric contract: everything in compute_t. In float an exp is 2^x of the special-function unit, within 2e-7, and dt
// and the gate within (3 + |x|) 1e-7 of theirs for an input x. The sum over n: four neighbouring n in order, then these
// sums by pairs. Nothing depends on how a sequence is cut or on other rows. Agrees with the CPU version to rounding, a
// rerun is bit-equal. Activations stored as bf16 are rounded once, when written.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/channelwise.cuh>
#include <zamba/ops/selective_scan/decode.cuh>
#include <zamba/ops/selective_scan/prefill.cuh>

namespace zamba {

template <>
struct SelectiveScan<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                      Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    if (sequences.tokens == 0) return;
    const Index N = in.B.shape[2];
    require(N <= 256, "selective_scan: on CUDA d_state is at most 256, got ", N);
    if constexpr (std::is_same_v<F, double>) {
      if (N <= 32)
        launch_channels<kernel::ChannelScanTraits<A, 32>>(ctx, in, sequences, state, y, checkpoints);
      else
        launch_channels<kernel::ChannelScanTraits<A, 256>>(ctx, in, sequences, state, y, checkpoints);
    } else if (N <= 32) {
      if (wide(in, state, y))
        launch_slices<A, true>(ctx, in, sequences, state, y, checkpoints);
      else
        launch_slices<A, false>(ctx, in, sequences, state, y, checkpoints);
    } else {
      launch_channels<kernel::ChannelScanTraits<A, 256>>(ctx, in, sequences, state, y, checkpoints);
    }
  }

 private:
  template <class T, int Rank>
  static bool in_fours(Tensor<T, Rank> tensor) {
    return kernel::aligned(tensor, 4) && tensor.cols() % 4 == 0;
  }
  template <class A>
  static bool wide(const SelectiveScanInputs<A, float>& in, Tensor<float, 3> state, Matrix<A> y) {
    return in.u.cols() / in.B.shape[1] % 4 == 0 && in_fours(in.u) && in_fours(in.delta) && in_fours(in.z) &&
           in_fours(in.B) && in_fours(in.C) && in_fours(in.A_log) && in_fours(state) && in_fours(y);
  }

  /// Tiles of so many channels in a row.
  template <class A>
  static Index tiles(const SelectiveScanInputs<A, float>& in, Index channels) {
    const Index heads = in.B.shape[1], P = in.u.cols() / heads;
    return heads * ceil_div(P, channels);
  }

  template <class A, bool Wide>
  static void launch_slices(Context<cuda>& ctx, const SelectiveScanInputs<A, float>& in, const Sequences& sequences,
                            Tensor<float, 3> state, Matrix<A> y, Tensor<float, 3> checkpoints) {
    const bool narrow = in.B.shape[2] <= 16;
    if (sequences.longest <= 1 && !checkpoints)
      return narrow ? launch_tokens<kernel::ScanTokenTraits<A, 4, Wide>>(ctx, in, sequences, state, y)
                    : launch_tokens<kernel::ScanTokenTraits<A, 8, Wide>>(ctx, in, sequences, state, y);
    return narrow ? launch_rows<kernel::SelectiveScanTraits<A, 4, Wide>>(ctx, in, sequences, state, y, checkpoints)
                  : launch_rows<kernel::SelectiveScanTraits<A, 8, Wide>>(ctx, in, sequences, state, y, checkpoints);
  }

  template <class Traits, class A>
  static void launch_rows(Context<cuda>& ctx, const SelectiveScanInputs<A, float>& in, const Sequences& sequences,
                          Tensor<float, 3> state, Matrix<A> y, Tensor<float, 3> checkpoints) {
    const auto blocks = static_cast<unsigned>(sequences.rows * tiles(in, Traits::channels));
    kernel::launch(ctx, "selective_scan", kernel::selective_scan_kernel<Traits>, blocks, Traits::threads, 0, in,
                   sequences, state, y, checkpoints);
  }

  template <class Traits, class A>
  static void launch_tokens(Context<cuda>& ctx, const SelectiveScanInputs<A, float>& in, const Sequences& sequences,
                            Tensor<float, 3> state, Matrix<A> y) {
    const Index across = tiles(in, Traits::channels), room = Traits::blocks * ctx.multiprocessors();
    const Index rows_each =
        std::clamp<Index>(ceil_div(sequences.rows * across, room), 1, kernel::SingleTokens::most_rows);
    const Index blocks = ceil_div(sequences.rows, rows_each) * across;
    kernel::launch(ctx, kernel::overlap_for(sequences.rows), "selective_scan: single tokens",
                   kernel::selective_scan_token_kernel<Traits>, static_cast<unsigned>(blocks), Traits::threads, 0, in,
                   sequences, state, y, static_cast<int>(rows_each));
  }

  template <class Traits, class A, class F>
  static void launch_channels(Context<cuda>& ctx, const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                              Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    const Index across = ceil_div(in.u.cols(), Traits::threads);
    const auto blocks = static_cast<unsigned>(sequences.rows * across);
    kernel::channel_scan_kernel<Traits>
        <<<blocks, Traits::threads, 0, ctx.stream()>>>(in, sequences, state, y, checkpoints);
    kernel::check_launch("selective_scan");
  }
};

}  // namespace zamba
