// SPDX-License-Identifier: MIT
// ssd on CUDA, forward; equations and shapes in ssd.hpp.
//
// Rows of more than few_tokens, stored as bf16: products of matrices on tensor cores, in ops/ssd/chunk_scan.cuh, with
// its numeric contract; long rows, where there are few, in segments side by side. Everything else: the recurrence
// itself, from a row's first token to its last. Neighbouring channels are a warp's neighbouring lanes, so that the
// state is read and written in whole lines; some lanes share the states of a channel, 16 a lane in registers, and their
// sums meet in a fixed order.
//
// Numeric contract of the recurrence: everything in compute_t; nothing depends on how a sequence is cut. Agrees with
// the CPU version to rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when written. Which
// of the two a row takes depends on its own length only.
#pragma once

#include <limits>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/chunk_scan.cuh>
#include <zamba/ops/ssd/state_passing.cuh>

namespace zamba {

namespace kernel {

/// Lanes_ lanes share Width_ neighbouring channels of at most 16 Lanes_ states.
template <class A_, int Lanes_, int Width_>
struct SsdTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int lanes = Lanes_, states = 16, width = Width_;  // states: of a lane and channel
  static constexpr int threads = 64, of_warp = 32 / lanes * width, channels = threads / 32 * of_warp;
  static_assert(lanes <= 32 && (lanes & (lanes - 1)) == 0,
                "zamba: the lanes of a channel are a power of two in a warp");
  template <class T>
  struct alignas(sizeof(T) * width) Piece {
    T of[width];
  };
};

/// Rows of at most `longest` tokens.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_kernel(SsdInputs<typename Traits::A, typename Traits::F> in, Sequences sequences,
               Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> y,
               Tensor<typename Traits::F, 3> checkpoints, Index chunk, Index longest) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  using Activations = typename Traits::template Piece<A>;
  using States = typename Traits::template Piece<F>;
  constexpr int width = Traits::width;
  launch_dependents();
  const Index D = in.u.cols(), heads = in.delta.cols(), N = in.B.shape[2];
  const Index across = ceil_div(D, Traits::channels), row = blockIdx.x / across;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = lane % (32 / Traits::lanes);
  const Index wanted = blockIdx.x % across * Traits::channels + warp * Traits::of_warp + place * width;
  const bool mine = wanted < D;  // lanes without a channel still take part in the sums
  const Index c = mine ? wanted : D - width, head = c / (D / heads), group = head / (heads / in.B.shape[1]);
  const Index first = lane / (32 / Traits::lanes) * Traits::states;
  const F a = -::exp(in.A_log[head]), bias = in.dt_bias[head], skip = in.D[head], least = F(in.dt_min);
  constexpr Index few_rows = 8;  // of more, most blocks begin when there is nothing left to wait for
  if (state && sequences.rows <= few_rows) {
#pragma unroll
    for (int n = 0; n < Traits::states; ++n)
      if (first + n < N) prefetch_to_cache(&state(row, first + n, c));
  }
  grid_dependency_wait();
  const Index begin = sequences.begin(row), end = begin + sequences.length(row);
  if (begin == end || end - begin > longest) return;
  const bool continued = state && sequences.start(row) > 0;

  States s[Traits::states];
#pragma unroll
  for (int n = 0; n < Traits::states; ++n)
    s[n] = continued && first + n < N ? *reinterpret_cast<const States*>(&state(row, first + n, c)) : States{};
  for (Index t = begin; t < end; ++t) {
    if (checkpoints && mine && (t - begin) % chunk == 0) {
      const Index k = begin / chunk + row + (t - begin) / chunk;
#pragma unroll
      for (int n = 0; n < Traits::states; ++n)
        if (first + n < N) *reinterpret_cast<States*>(&checkpoints(k, first + n, c)) = s[n];
    }
    const F delta = F(in.delta(t, head)) + bias;
    const Activations u = *reinterpret_cast<const Activations*>(&in.u(t, c));
    const F dt = ::max(least, delta > F(20) ? delta : ::log1p(::exp(delta)));
    const F decay = ::exp(dt * a);
    const A* B = &in.B(t, group, 0);
    const A* C = &in.C(t, group, 0);
    F dt_u[width], sum[width] = {};
#pragma unroll
    for (int i = 0; i < width; ++i) dt_u[i] = dt * F(u.of[i]);
#pragma unroll
    for (int n = 0; n < Traits::states; ++n)
      if (first + n < N) {
        const F B_n = F(B[first + n]), C_n = F(C[first + n]);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          s[n].of[i] = decay * s[n].of[i] + dt_u[i] * B_n;
          sum[i] += s[n].of[i] * C_n;
        }
      }
#pragma unroll
    for (int distance = 16; distance >= 32 / Traits::lanes; distance /= 2)
#pragma unroll
      for (int i = 0; i < width; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
    if (mine && first == 0) {
      Activations out;
#pragma unroll
      for (int i = 0; i < width; ++i) out.of[i] = A(sum[i] + skip * F(u.of[i]));
      *reinterpret_cast<Activations*>(&y(t, c)) = out;
    }
  }
  if (state && mine) {
#pragma unroll
    for (int n = 0; n < Traits::states; ++n)
      if (first + n < N) *reinterpret_cast<States*>(&state(row, first + n, c)) = s[n];
  }
}

}  // namespace kernel

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
      if (sequences.longest > few_tokens && products_can(ctx, in, y, checkpoints, chunk)) {
        products(ctx, in, sequences, state, y, checkpoints);
        if (sequences.rows == 1) return;
        longest = few_tokens;
      }
    constexpr int width = std::is_same_v<F, float> ? 4 : 1;  // 16 bytes of a state
    if (width > 1 && N <= 128 && in_pieces_of<width>(in, state, y, checkpoints))
      recur<A, width>(ctx, in, sequences, state, y, checkpoints, chunk, longest);
    else
      recur<A, 1>(ctx, in, sequences, state, y, checkpoints, chunk, longest);
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

  static bool products_can(const Context<cuda>& ctx, const SsdInputs<bf16, float>& in, Matrix<bf16> y,
                           Tensor<float, 3> checkpoints, Index chunk) {
    constexpr Index piece = 8;  // of 16 bytes
    const Index N = in.B.shape[2];
    return N <= 128 && N % piece == 0 && in.u.cols() / in.delta.cols() % piece == 0 && kernel::aligned(in.u, piece) &&
           kernel::aligned(in.B, piece) && kernel::aligned(in.C, piece) && kernel::aligned(y, piece) &&
           (!checkpoints || chunk == kernel::SsdProductTraits<64, 64>::Q) &&
           ctx.most_shared() >= (N <= 64 ? shared_bytes<64, 64> : shared_bytes<128, 64>);
  }

  template <int N, int P>
  static constexpr std::size_t shared_bytes = kernel::SsdShared<kernel::SsdProductTraits<N, P>>::bytes;

  template <class F>
  static void with_traits(const SsdInputs<bf16, float>& in, F&& f) {
    const bool narrow = in.u.cols() / in.delta.cols() <= 32;
    if (in.B.shape[2] <= 64)
      narrow ? f(kernel::SsdProductTraits<64, 32>{}) : f(kernel::SsdProductTraits<64, 64>{});
    else
      narrow ? f(kernel::SsdProductTraits<128, 32>{}) : f(kernel::SsdProductTraits<128, 64>{});
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

  static void products(Context<cuda>& ctx, const SsdInputs<bf16, float>& in, const Sequences& sequences,
                       Tensor<float, 3> state, Matrix<bf16> y, Tensor<float, 3> checkpoints) {
    with_traits(in, [&]<class Traits>(Traits) {
      constexpr int N = Traits::N, P = Traits::P;
      const Index of_row = parts_of_row<Traits>(in), parts = sequences.rows * of_row;
      ArenaScope scope(ctx.arena());
      const kernel::SsdSegments of_rows = segments<Traits>(ctx, in, sequences, ctx.multiprocessors());
      if (of_rows.count > 1) {
        using States = kernel::SsdProductTraits<N, P, false>;
        kernel::launch(ctx, "ssd: segments", kernel::ssd_segments_kernel<States>,
                       static_cast<unsigned>(parts * (of_rows.count - 1)), States::threads,
                       kernel::SsdShared<States>::bytes, in, sequences, state, of_rows, few_tokens);
        kernel::launch(ctx, "ssd: states between segments", kernel::ssd_carry_kernel<States>,
                       static_cast<unsigned>(parts * (N * P / 4 / States::threads)), States::threads, 0, sequences,
                       of_rows, of_row, few_tokens);
      }
      kernel::launch(ctx, "ssd", kernel::ssd_products_kernel<Traits>, static_cast<unsigned>(parts * of_rows.count),
                     Traits::threads, shared_bytes<N, P>, in, sequences, state, y, checkpoints, of_rows, few_tokens);
    });
  }

  template <class A, int Width, class F>
  static void recur(Context<cuda>& ctx, const SsdInputs<A, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                    Matrix<A> y, Tensor<F, 3> checkpoints, Index chunk, Index longest) {
    const Index N = in.B.shape[2];
    const auto of_lanes = [&](auto lanes) {
      using Traits = kernel::SsdTraits<A, lanes, Width>;
      const Index across = ceil_div(in.u.cols(), Traits::channels);
      kernel::launch(ctx, "ssd", kernel::ssd_kernel<Traits>, static_cast<unsigned>(across * sequences.rows),
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
};

}  // namespace zamba
