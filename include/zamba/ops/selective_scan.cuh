// SPDX-License-Identifier: MIT
// selective_scan on CUDA; equations and shapes in selective_scan.hpp.
//
// Forward. Float and up to 32 states: ops/selective_scan/prefill.cuh for rows of some tokens,
// ops/selective_scan/decode.cuh for single ones. Double and more states: a thread a channel,
// ops/selective_scan/channelwise.cuh.
//
// Backward. Float and up to 16 states: ops/selective_scan/backward.cuh. Double and more states, and on GPUs with less
// shared memory than that takes: ops/selective_scan/channelwise_backward.cuh. Both leave partial sums of dB, dC and of
// the parameters' gradients, which are added in order here.
//
// Numeric contract: everything in compute_t. In float an exp is 2^x of the special-function unit, within 2e-7, and dt
// and the gate within (3 + |x|) 1e-7 of theirs for an input x. The sum over n: four neighbouring n in order, then these
// sums by pairs. Nothing depends on how a sequence is cut or on other rows. Agrees with the CPU version to rounding, a
// rerun is bit-equal. Activations stored as bf16 are rounded once, when written.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/backward.cuh>
#include <zamba/ops/selective_scan/channelwise.cuh>
#include <zamba/ops/selective_scan/channelwise_backward.cuh>
#include <zamba/ops/selective_scan/decode.cuh>
#include <zamba/ops/selective_scan/prefill.cuh>

namespace zamba {

namespace kernel {

/// dB and dC (tokens, heads, N): each head's sum over its `per_head` tiles, in order; for i = 2 N token + value.
template <class A>
struct AddScanTiles {
  using F = compute_t<A>;
  Tensor<const F, 3> BC;  // ScanPartials
  F scale;
  Index per_head;
  Tensor<A, 3> d_B, d_C;

  __device__ void operator()(Index head, Index i) const {
    const F* part = &BC(head * per_head, 0, 0) + i;
    F sum = 0;
#pragma unroll 8
    for (Index k = 0; k < per_head; ++k) sum += part[k * BC.stride[0]];
    const Index N = d_B.shape[2], token = i / (2 * N), value = i % (2 * N);
    (value < N ? d_B(token, head, value) : d_C(token, head, value - N)) = A(sum * scale);
  }
};

/// The parameters' gradients are added to: each channel's sums over groups of rows, in order. dA / dA_log = A.
template <class F>
struct AddScanGroups {
  Tensor<const F, 3> parameters;  // ScanPartials
  Matrix<const F> A_log;
  Matrix<F> d_A_log;
  Vector<F> d_D, d_bias;

  __device__ void operator()(Index, Index element) const {
    const Index N = A_log.cols(), c = element / (N + 2), i = element % (N + 2);
    F sum = 0;
    for (Index group = 0; group < parameters.shape[0]; ++group) sum += parameters(group, c, i);
    if (i < N)
      d_A_log(c, i) -= sum * ::exp(A_log(c, i));
    else
      (i == N ? d_D : d_bias)[c] += sum;
  }
};

}  // namespace kernel

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

  template <class A, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_y, const SelectiveScanInputs<A, F>& in,
                       const Sequences& sequences, Tensor<const F, 3> checkpoints,
                       const SelectiveScanGradients<A, F>& out, Tensor<F, 3> d_state) {
    if (sequences.tokens == 0) return;
    const int channels = backward_channels<A>(ctx, in);
    const auto by = [&]<class Traits>(auto* kernel, std::size_t shared, Traits) {
      launch_backward<Traits>(ctx, kernel, shared, d_y, in, sequences, checkpoints, out, d_state);
    };
    const auto by_blocks_of = [&]<int Channels>(std::integral_constant<int, Channels>) {
      if constexpr (has_blocks_of<A, Channels>) {
        using Wide = kernel::ScanBackwardTraits<A, Channels, true>;
        using Single = kernel::ScanBackwardTraits<A, Channels, false>;
        constexpr std::size_t shared = sizeof(kernel::ScanBackwardShared<Wide>);
        wide(d_y, in, out) ? by(kernel::selective_scan_backward_kernel<Wide>, shared, Wide{})
                           : by(kernel::selective_scan_backward_kernel<Single>, shared, Single{});
      }
    };
    if (channels == 64) return by_blocks_of(std::integral_constant<int, 64>{});
    if (channels == 32) return by_blocks_of(std::integral_constant<int, 32>{});
    using Traits = kernel::ChannelBackwardTraits<A>;
    by(kernel::channel_backward_kernel<Traits>, sizeof(kernel::ChannelBackwardShared<Traits>), Traits{});
  }

  template <class Ctx, class A, class F>
  static kernel::ScanPartials<F> backward_scratch(Ctx& ctx, Matrix<const A>, const SelectiveScanInputs<A, F>& in,
                                                  const Sequences& sequences, Tensor<const F, 3>,
                                                  const SelectiveScanGradients<A, F>&, Tensor<F, 3>) {
    const Index N = in.B.shape[2], D = in.u.cols(), groups = ceil_div(sequences.rows, rows_of_group(sequences));
    const int channels = backward_channels<A>(ctx, in);
    const Index across = tiles(in, channels > 0 ? channels : kernel::ChannelBackwardTraits<A>::channels);
    kernel::ScanPartials<F> partials{ctx.arena().template tensor<F>(across, sequences.tokens, 2 * N),
                                     ctx.arena().template tensor<F>(groups, D, N + 2),
                                     {}};
    if (channels == 0) partials.adjoints = ctx.arena().template tensor<F>(groups, N, D);
    return partials;
  }

 private:
  /// Rows whose sums are one of the partial sums of the parameters' gradients.
  static Index rows_of_group(const Sequences& sequences) { return ceil_div(sequences.rows, most_groups); }
  /// At most so many partial sums of the parameters' gradients.
  static constexpr Index most_groups = 64;

  template <class T, int Rank>
  static bool in_fours(Tensor<T, Rank> tensor) {
    return kernel::aligned(tensor, 4) && tensor.cols() % 4 == 0;
  }
  template <class A>
  static bool wide(const SelectiveScanInputs<A, float>& in, Tensor<float, 3> state, Matrix<A> y) {
    return in.u.cols() / in.B.shape[1] % 4 == 0 && in_fours(in.u) && in_fours(in.delta) && in_fours(in.z) &&
           in_fours(in.B) && in_fours(in.C) && in_fours(in.A_log) && in_fours(state) && in_fours(y);
  }

  /// Whether blocks of so many channels scan backwards: in float, and in the memory of the largest multiprocessors.
  template <class A, int Channels>
  static constexpr bool has_blocks_of =
      std::is_same_v<compute_t<A>, float> &&
      sizeof(kernel::ScanBackwardShared<kernel::ScanBackwardTraits<A, Channels, true>>) <= 227 << 10;

  /// Channels of a block of the backward pass; 0: a thread has one.
  template <class A, class Ctx, class F>
  static int backward_channels(const Ctx& ctx, const SelectiveScanInputs<A, F>& in) {
    const auto fit = [&]<int Channels>(std::integral_constant<int, Channels>) {
      using Shared = kernel::ScanBackwardShared<kernel::ScanBackwardTraits<A, Channels, true>>;
      return has_blocks_of<A, Channels> && in.B.shape[2] <= 16 && sizeof(Shared) <= ctx.most_shared();
    };
    return fit(std::integral_constant<int, 64>{}) ? 64 : fit(std::integral_constant<int, 32>{}) ? 32 : 0;
  }

  template <class A, class F>
  static bool wide(Matrix<const A> d_y, const SelectiveScanInputs<A, F>& in, const SelectiveScanGradients<A, F>& out) {
    return in.u.cols() / in.B.shape[1] % 4 == 0 && in_fours(in.u) && in_fours(in.delta) && in_fours(in.z) &&
           in_fours(in.B) && in_fours(in.C) && in_fours(d_y) && in_fours(out.u) && in_fours(out.delta) &&
           in_fours(out.z);
  }

  /// A backward pass by such a kernel, and the sums of what its blocks leave.
  template <class Traits, class Kernel, class A, class F>
  static void launch_backward(Context<cuda>& ctx, Kernel* kernel, std::size_t shared, Matrix<const A> d_y,
                              const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                              Tensor<const F, 3> checkpoints, const SelectiveScanGradients<A, F>& out,
                              Tensor<F, 3> d_state) {
    const Index N = in.B.shape[2], heads = in.B.shape[1], D = in.u.cols(), across = tiles(in, Traits::channels);
    const Index rows_each = rows_of_group(sequences), groups = ceil_div(sequences.rows, rows_each);
    ArenaScope scope(ctx.arena());
    const kernel::ScanPartials<F> partials = backward_scratch(ctx, d_y, in, sequences, checkpoints, out, d_state);
    kernel::launch(ctx, kernel::overlap_for(sequences.tokens), "selective_scan_backward", kernel,
                   static_cast<unsigned>(groups * across), static_cast<unsigned>(Traits::threads), shared, in, d_y,
                   sequences, checkpoints, out, d_state, partials, rows_each);
    kernel::for_elements(ctx, heads, 2 * N * sequences.tokens,
                         kernel::AddScanTiles<A>{partials.BC, F(Traits::BC_scale), across / heads, out.B, out.C},
                         "selective_scan_backward: sums over channels");
    kernel::for_elements(ctx, 1, D * (N + 2),
                         kernel::AddScanGroups<F>{partials.parameters, in.A_log, out.A_log, out.D, out.delta_bias},
                         "selective_scan_backward: sums over rows");
  }

  /// Tiles of so many channels in a row.
  template <class A, class F>
  static Index tiles(const SelectiveScanInputs<A, F>& in, Index channels) {
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
