// SPDX-License-Identifier: MIT
// ssd on CUDA; equations and shapes in ssd.hpp. Forward:
//
//   more than 8 tokens of a row, bf16   the chunk scan, products on tensor cores: ops/ssd/chunk_scan.cuh, with its
//                                       numeric contract; long rows, where there are few, in segments side by side,
//                                       between which ops/ssd/state_passing.cuh passes the states
//   everything else                     the recurrence as it stands, token by token: ops/ssd/decode.cuh
//
// Backward:
//
//   bf16, states kept every 64 tokens   the gradients of the states from each row's last chunk to its first, then of
//                                       all chunks side by side, products on tensor cores: ops/ssd/state_gradient.cuh,
//                                       ops/ssd/chunk_gradient.cuh
//   everything else                     chunk by chunk, in plain loops: ops/ssd/backward.cuh
//
// Numeric contract of the recurrence: everything in compute_t; nothing depends on how a sequence is cut. Agrees with
// the CPU version to rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when written. Which
// of the two a row takes depends on its own length only.
#pragma once

#include <algorithm>
#include <limits>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/backward.cuh>
#include <zamba/ops/ssd/chunk_gradient.cuh>
#include <zamba/ops/ssd/chunk_scan.cuh>
#include <zamba/ops/ssd/decode.cuh>
#include <zamba/ops/ssd/state_gradient.cuh>
#include <zamba/ops/ssd/state_passing.cuh>

namespace zamba {

template <>
struct Ssd<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, const SsdInputs<A, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                      Matrix<A> y, Tensor<F, 3> checkpoints, Index chunk) {
    if (sequences.tokens == 0) return;
    const Index N = in.B.shape[2];
    require(N <= 512, "ssd: on CUDA d_state is at most 512, got ", N);
    Index longest = std::numeric_limits<Index>::max();
    if constexpr (std::is_same_v<A, bf16>)
      if (sequences.longest > few_tokens && scans_chunks(ctx, in, y, checkpoints, chunk)) {
        scan_chunks(ctx, in, sequences, state, y, checkpoints);
        if (sequences.rows == 1) return;
        longest = few_tokens;
      }
    constexpr int width = std::is_same_v<F, float> ? 4 : 1;  // 16 bytes of a state
    if (width > 1 && N <= 128 && in_pieces_of<width>(in, state, y, checkpoints))
      recur<A, width>(ctx, in, sequences, state, y, checkpoints, chunk, longest);
    else
      recur<A, 1>(ctx, in, sequences, state, y, checkpoints, chunk, longest);
  }

  template <class A, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_y, const SsdInputs<A, F>& in, const Sequences& sequences,
                       Tensor<const F, 3> checkpoints, const SsdGradients<A, F>& out, Tensor<F, 3> d_state,
                       Index chunk) {
    if (sequences.tokens == 0) return;
    if constexpr (std::is_same_v<A, bf16>)
      if (differentiates_chunks(ctx, d_y, in, checkpoints, out, chunk))
        return differentiate_chunks(ctx, d_y, in, sequences, checkpoints, out, d_state);
    differentiate_rows(ctx, d_y, in, sequences, checkpoints, out, d_state, chunk);
  }
  template <class Ctx, class A, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A> d_y, const SsdInputs<A, F>& in, const Sequences& sequences,
                               Tensor<const F, 3> checkpoints, const SsdGradients<A, F>& out, Tensor<F, 3>,
                               Index chunk) {
    if constexpr (std::is_same_v<A, bf16>)
      if (differentiates_chunks(ctx, d_y, in, checkpoints, out, chunk)) {
        chunk_scratch(ctx, in, sequences);
        return;
      }
    row_scratch(ctx, in, sequences, chunk);
  }

  /// Of the segments of long rows, on whatever GPU.
  template <class Ctx, class A, class F>
  static void scratch(Ctx& ctx, const SsdInputs<A, F>& in, const Sequences& sequences, Tensor<F, 3>, Matrix<A>,
                      Tensor<F, 3>, Index) {
    if constexpr (std::is_same_v<A, bf16>)
      if (in.B.shape[2] <= 128)
        with_traits(in, [&]<class Traits>(Traits) { segments<Traits>(ctx, in, sequences, most_multiprocessors); });
  }

 private:
  /// Up to so many tokens of a row, its recurrence takes no longer than a chunk of products.
  static constexpr Index few_tokens = 8;
  /// No GPU has more.
  static constexpr Index most_multiprocessors = 256;

  template <int Width, class A, class F>
  static bool in_pieces_of(const SsdInputs<A, F>& in, Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    return in.u.cols() / in.delta.cols() % Width == 0 && kernel::aligned(in.u, Width) && kernel::aligned(y, Width) &&
           kernel::aligned(state, Width) && kernel::aligned(checkpoints, Width);
  }

  static bool scans_chunks(const Context<cuda>& ctx, const SsdInputs<bf16, float>& in, Matrix<bf16> y,
                           Tensor<float, 3> checkpoints, Index chunk) {
    constexpr Index piece = 8;  // of 16 bytes
    const Index N = in.B.shape[2];
    return N <= 128 && N % piece == 0 && in.u.cols() / in.delta.cols() % piece == 0 && kernel::aligned(in.u, piece) &&
           kernel::aligned(in.B, piece) && kernel::aligned(in.C, piece) && kernel::aligned(y, piece) &&
           (!checkpoints || chunk == kernel::SsdChunkTraits<64, 64>::Q) &&
           ctx.most_shared() >= (N <= 64 ? shared_bytes<64, 64> : shared_bytes<128, 64>);
  }

  template <int N, int P>
  static constexpr std::size_t shared_bytes = kernel::SsdShared<kernel::SsdChunkTraits<N, P>>::bytes;

  template <class F>
  static void with_traits(const SsdInputs<bf16, float>& in, F&& f) {
    const bool narrow = in.u.cols() / in.delta.cols() <= 32;
    if (in.B.shape[2] <= 64)
      narrow ? f(kernel::SsdChunkTraits<64, 32>{}) : f(kernel::SsdChunkTraits<64, 64>{});
    else
      narrow ? f(kernel::SsdChunkTraits<128, 32>{}) : f(kernel::SsdChunkTraits<128, 64>{});
  }

  /// Shares of a row, each a head's or a part of it.
  template <class Traits>
  static Index parts_of_row(const SsdInputs<bf16, float>& in) {
    const Index heads = in.delta.cols();
    return heads * ceil_div(in.u.cols() / heads, Traits::P);
  }

  /// Memory for the segments of rows, where blocks take these. They cost a second reading of u and B, which pays where
  /// the GPU would be half empty.
  template <class Traits, class Ctx>
  static kernel::SsdSegments segments(Ctx& ctx, const SsdInputs<bf16, float>& in, const Sequences& sequences,
                                      Index multiprocessors) {
    const Index parts = sequences.rows * parts_of_row<Traits>(in), tokens = Traits::segment * Traits::Q;
    const Index count = ceil_div(sequences.longest, tokens);
    if (count <= 1 || 2 * parts > Traits::blocks * multiprocessors) return {};
    return {ctx.arena().template tensor<float>(parts, count, Index{Traits::N * Traits::P}),
            ctx.arena().template tensor<float>(parts, count), static_cast<int>(count)};
  }

  static void scan_chunks(Context<cuda>& ctx, const SsdInputs<bf16, float>& in, const Sequences& sequences,
                          Tensor<float, 3> state, Matrix<bf16> y, Tensor<float, 3> checkpoints) {
    with_traits(in, [&]<class Traits>(Traits) {
      constexpr int N = Traits::N, P = Traits::P;
      const Index of_row = parts_of_row<Traits>(in), parts = sequences.rows * of_row;
      ArenaScope scope(ctx.arena());
      const kernel::SsdSegments of_rows = segments<Traits>(ctx, in, sequences, ctx.multiprocessors());
      if (of_rows.count > 1) {
        using States = kernel::SsdChunkTraits<N, P, false>;
        kernel::launch(ctx, "ssd: segments", kernel::ssd_segment_state_kernel<States>,
                       static_cast<unsigned>(parts * (of_rows.count - 1)), States::threads,
                       kernel::SsdShared<States>::bytes, in, sequences, state, of_rows, few_tokens);
        kernel::launch(ctx, "ssd: states between segments", kernel::ssd_state_passing_kernel<States>,
                       static_cast<unsigned>(parts * (N * P / 4 / States::threads)), States::threads, 0, sequences,
                       of_rows, of_row, few_tokens);
      }
      kernel::launch(ctx, "ssd", kernel::ssd_chunk_scan_kernel<Traits>, static_cast<unsigned>(parts * of_rows.count),
                     Traits::threads, shared_bytes<N, P>, in, sequences, state, y, checkpoints, of_rows, few_tokens);
    });
  }

  template <class A, int Width, class F>
  static void recur(Context<cuda>& ctx, const SsdInputs<A, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                    Matrix<A> y, Tensor<F, 3> checkpoints, Index chunk, Index longest) {
    const Index N = in.B.shape[2];
    const auto of_lanes = [&](auto lanes) {
      using Traits = kernel::SsdDecodeTraits<A, lanes, Width>;
      const Index across = ceil_div(in.u.cols(), Traits::channels);
      kernel::launch(ctx, "ssd", kernel::ssd_decode_kernel<Traits>, static_cast<unsigned>(across * sequences.rows),
                     Traits::threads, 0, in, sequences, state, y, checkpoints, chunk, longest);
    };
    if (N <= 32)
      of_lanes(std::integral_constant<int, 2>{});
    else if (N <= 64)
      of_lanes(std::integral_constant<int, 4>{});
    else if (Width > 1 || N <= 128)
      of_lanes(std::integral_constant<int, 8>{});
    else
      of_lanes(std::integral_constant < int, Width == 1 ? 32 : 8 > {});
  }

  template <class Ctx>
  static bool differentiates_chunks(const Ctx& ctx, Matrix<const bf16> d_y, const SsdInputs<bf16, float>& in,
                                    Tensor<const float, 3> checkpoints, const SsdGradients<bf16, float>& out,
                                    Index chunk) {
    constexpr Index piece = 8;  // of 16 bytes
    const Index N = in.B.shape[2];
    return chunk == 64 && N <= 128 && N % piece == 0 && in.u.cols() / in.delta.cols() % piece == 0 &&
           kernel::aligned(in.u, piece) && kernel::aligned(d_y, piece) && kernel::aligned(in.B, piece) &&
           kernel::aligned(in.C, piece) && kernel::aligned(out.u, piece) && kernel::aligned(checkpoints, piece / 2) &&
           ctx.most_shared() >= (N <= 64 ? gradient_bytes<64> : gradient_bytes<128>);
  }

  template <int N>
  static constexpr std::size_t gradient_bytes =
      kernel::SsdGradientShared<kernel::SsdGradientTraits<N>>::bytes(kernel::SsdGradientTraits<N>::most_heads);

  static void differentiate_chunks(Context<cuda>& ctx, Matrix<const bf16> d_y, const SsdInputs<bf16, float>& in,
                                   const Sequences& sequences, Tensor<const float, 3> checkpoints,
                                   const SsdGradients<bf16, float>& out, Tensor<float, 3> d_state) {
    const auto with = [&]<int N>(std::integral_constant<int, N>) {
      using States = kernel::SsdStateGradientTraits<N>;
      using Traits = kernel::SsdGradientTraits<N>;
      const Index slots = ssd_checkpoint_count(sequences), heads = in.delta.cols();
      const kernel::SsdBlocks blocks = blocks_of_chunks(in, sequences);
      const kernel::Overlap overlap = kernel::overlap_for(sequences.tokens);
      ArenaScope scope(ctx.arena());
      const auto [parts, after] = chunk_scratch(ctx, in, sequences);
      kernel::launch(ctx, overlap, "ssd_backward: states", kernel::ssd_state_gradient_kernel<States>,
                     static_cast<unsigned>(sequences.rows * heads * ceil_div(blocks.P, States::P)), States::threads,
                     kernel::SsdStateGradientShared<States>::bytes, d_y, in, sequences, d_state, after);
      kernel::launch(ctx, overlap, "ssd_backward: chunks", kernel::ssd_chunk_gradient_kernel<Traits>,
                     static_cast<unsigned>(slots * blocks.count()), Traits::threads,
                     kernel::SsdGradientShared<Traits>::bytes(blocks.heads), d_y, in, sequences, checkpoints, after,
                     out, blocks, parts);
      add_up(ctx, blocks, parts, out);
    };
    if (in.B.shape[2] <= 64)
      with(std::integral_constant<int, 64>{});
    else
      with(std::integral_constant<int, 128>{});
  }

  template <class A, class F>
  static void differentiate_rows(Context<cuda>& ctx, Matrix<const A> d_y, const SsdInputs<A, F>& in,
                                 const Sequences& sequences, Tensor<const F, 3> checkpoints,
                                 const SsdGradients<A, F>& out, Tensor<F, 3> d_state, Index chunk) {
    using Traits = kernel::SsdBackwardTraits<A>;
    const kernel::SsdBlocks blocks = blocks_of_rows(in, sequences);
    const Index count = sequences.rows * blocks.count();
    ArenaScope scope(ctx.arena());
    const auto [parts, memory] = row_scratch(ctx, in, sequences, chunk);
    kernel::launch(ctx, kernel::overlap_for(sequences.tokens), "ssd_backward", kernel::ssd_backward_kernel<Traits>,
                   static_cast<unsigned>(count), Traits::threads, 0, d_y, in, sequences, checkpoints, out, d_state,
                   chunk, blocks, parts, memory);
    add_up(ctx, blocks, parts, out);
  }

  static kernel::SsdBlocks blocks_of_chunks(const SsdInputs<bf16, float>& in, const Sequences& sequences) {
    constexpr Index wanted = 512;  // blocks; of more heads, less is computed twice and added up afterwards
    const Index most_heads = in.B.shape[2] <= 64 ? Index{kernel::SsdGradientTraits<64>::most_heads}
                                                 : Index{kernel::SsdGradientTraits<128>::most_heads};
    return {in, std::min<Index>(ssd_checkpoint_count(sequences) * in.delta.cols() / wanted, most_heads)};
  }
  template <class A, class F>
  static kernel::SsdBlocks blocks_of_rows(const SsdInputs<A, F>& in, const Sequences& sequences) {
    constexpr Index tasks = 256;  // about so many are wanted, and no more parts of dB and dC than that takes
    return {in, sequences.rows * in.delta.cols() / tasks};
  }

  template <class F, class Memory>
  struct BackwardScratch {
    kernel::SsdGradientParts<F> parts;
    Memory memory;
  };
  /// The memory: gradients of the states after all chunks, (slots, N, D).
  template <class Ctx>
  static BackwardScratch<float, Tensor<bf16, 3>> chunk_scratch(Ctx& ctx, const SsdInputs<bf16, float>& in,
                                                               const Sequences& sequences) {
    const kernel::SsdBlocks blocks = blocks_of_chunks(in, sequences);
    const Index slots = ssd_checkpoint_count(sequences);
    return {gradient_parts<float>(ctx, blocks, sequences.tokens, slots),
            ctx.arena().template tensor<bf16>(slots, blocks.N, in.u.cols())};
  }
  /// The memory: of each block, (blocks, ...).
  template <class Ctx, class A, class F>
  static BackwardScratch<F, Matrix<F>> row_scratch(Ctx& ctx, const SsdInputs<A, F>& in, const Sequences& sequences,
                                                   Index chunk) {
    using Gradient = kernel::SsdHeadGradient<kernel::SsdBackwardTraits<A>>;
    const kernel::SsdBlocks blocks = blocks_of_rows(in, sequences);
    return {gradient_parts<F>(ctx, blocks, sequences.tokens, sequences.rows),
            ctx.arena().template tensor<F>(
                sequences.rows * blocks.count(),
                Index{Gradient::memory(std::min(chunk, sequences.longest), blocks.N, blocks.P)})};
  }
  template <class F, class Ctx>
  static kernel::SsdGradientParts<F> gradient_parts(Ctx& ctx, const kernel::SsdBlocks& blocks, Index tokens,
                                                    Index pieces) {
    return {ctx.arena().template tensor<F>(blocks.count(), tokens, 2 * blocks.N),
            ctx.arena().template tensor<F>(Index{3}, blocks.H, pieces)};
  }

  template <class A, class F>
  static void add_up(Context<cuda>& ctx, const kernel::SsdBlocks& blocks, const kernel::SsdGradientParts<F>& parts,
                     const SsdGradients<A, F>& out) {
    using Traits = kernel::SsdBackwardTraits<A>;
    const kernel::Overlap overlap = kernel::overlap_for(out.u.rows());
    kernel::launch(ctx, overlap, "ssd_backward: B and C", kernel::ssd_add_parts_kernel<Traits>,
                   kernel::blocks_for(out.B.shape[0], 1), Traits::add_threads, 0, parts.BC,
                   static_cast<int>(blocks.per_group), out.B, out.C);
    kernel::launch(ctx, overlap, "ssd_backward: parameters", kernel::ssd_add_parameters_kernel<Traits>,
                   static_cast<unsigned>(3 * blocks.H), Traits::threads, 0, parts.parameters, out);
  }
};

}  // namespace zamba
