// SPDX-License-Identifier: MIT
// ssd on CUDA, forward; equations and shapes in ssd.hpp.
//
// The recurrence itself, from a row's first token to its last: neighbouring lanes share the states of a channel, 16 a
// lane in registers, and their sums meet in a fixed order.
//
// Numeric contract: everything in compute_t; nothing depends on how a sequence is cut. Agrees with the CPU version to
// rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/ops/ssd.hpp>

namespace zamba {

namespace detail {

/// Lanes_ lanes share a channel of at most 16 Lanes_ states.
template <class A_, int Lanes_>
struct SsdTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int lanes = Lanes_, states = 16;  // of a lane
  static constexpr int threads = 128, channels = threads / lanes;
  static_assert(lanes <= 32 && (lanes & (lanes - 1)) == 0,
                "zamba: the lanes of a channel are a power of two in a warp");
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_kernel(SsdInputs<typename Traits::A, typename Traits::F> in, Sequences sequences,
               Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> y,
               Tensor<typename Traits::F, 3> checkpoints, Index chunk) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  const Index row = blockIdx.y, D = in.u.cols(), heads = in.delta.cols(), N = in.B.shape[2];
  const Index wanted = Index{blockIdx.x} * Traits::channels + threadIdx.x / Traits::lanes;
  const bool mine = wanted < D;  // lanes without a channel still take part in the sums
  const Index c = mine ? wanted : D - 1, head = c / (D / heads), group = head / (heads / in.B.shape[1]);
  const Index first = threadIdx.x % Traits::lanes * Traits::states;
  if (sequences.length(row) == 0) return;
  const Index begin = sequences.begin(row), end = begin + sequences.length(row);
  const bool continued = state && sequences.start(row) > 0;
  const F a = -::exp(in.A_log[head]), bias = in.dt_bias[head], skip = in.D[head], least = F(in.dt_min);

  F s[Traits::states];
#pragma unroll
  for (int n = 0; n < Traits::states; ++n) s[n] = continued && first + n < N ? state(row, first + n, c) : F(0);
  for (Index t = begin; t < end; ++t) {
    if (checkpoints && mine && (t - begin) % chunk == 0) {
      const Index k = begin / chunk + row + (t - begin) / chunk;
#pragma unroll
      for (int n = 0; n < Traits::states; ++n)
        if (first + n < N) checkpoints(k, first + n, c) = s[n];
    }
    const F delta = F(in.delta(t, head)) + bias, u = F(in.u(t, c));
    const F dt = ::max(least, delta > F(20) ? delta : ::log1p(::exp(delta)));
    const F decay = ::exp(dt * a), dt_u = dt * u;
    const A* B = &in.B(t, group, 0);
    const A* C = &in.C(t, group, 0);
    F sum = 0;
#pragma unroll
    for (int n = 0; n < Traits::states; ++n)
      if (first + n < N) {
        s[n] = decay * s[n] + dt_u * F(B[first + n]);
        sum += s[n] * F(C[first + n]);
      }
#pragma unroll
    for (int distance = Traits::lanes / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (mine && first == 0) y(t, c) = A(sum + skip * u);
  }
  if (state && mine) {
#pragma unroll
    for (int n = 0; n < Traits::states; ++n)
      if (first + n < N) state(row, first + n, c) = s[n];
  }
}

}  // namespace detail

template <>
struct Ssd<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, const SsdInputs<A, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                      Matrix<A> y, Tensor<F, 3> checkpoints, Index chunk) {
    if (sequences.tokens == 0) return;
    const Index N = in.B.shape[2];
    require(N <= 512, "ssd: on CUDA d_state is at most 512, got ", N);
    if (N <= 32)
      launch<detail::SsdTraits<A, 2>>(ctx, in, sequences, state, y, checkpoints, chunk);
    else if (N <= 64)
      launch<detail::SsdTraits<A, 4>>(ctx, in, sequences, state, y, checkpoints, chunk);
    else if (N <= 128)
      launch<detail::SsdTraits<A, 8>>(ctx, in, sequences, state, y, checkpoints, chunk);
    else
      launch<detail::SsdTraits<A, 32>>(ctx, in, sequences, state, y, checkpoints, chunk);
  }

 private:
  template <class Traits, class A, class F>
  static void launch(Context<cuda>& ctx, const SsdInputs<A, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                     Matrix<A> y, Tensor<F, 3> checkpoints, Index chunk) {
    const dim3 grid(detail::blocks_for(in.u.cols(), Traits::channels), static_cast<unsigned>(sequences.rows));
    detail::ssd_kernel<Traits><<<grid, Traits::threads, 0, ctx.stream()>>>(in, sequences, state, y, checkpoints, chunk);
    detail::check_launch("ssd");
  }
};

}  // namespace zamba
