// SPDX-License-Identifier: MIT
// selective_scan on CUDA, forward; equations and shapes in selective_scan.hpp.
//
// One thread a channel of a row, from its first token to its last, the N states in registers (in local memory for N
// over 32). Threads of a warp are neighbouring channels, so the reads of u, delta, z and the writes of y are whole
// lines; B and C are the same for the channels of a head and come from cache.
//
// Numeric contract: everything in compute_t, sums over n in order, nothing depends on how a sequence is cut. Agrees
// with the CPU version to rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/ops/selective_scan.hpp>

namespace zamba {

namespace detail {

/// The constants of a scan of activations A_ with at most States_ states a channel.
template <class A_, int States_>
struct SelectiveScanTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int states = States_;
  static constexpr int threads = 64;
  static constexpr int unroll = states <= 32 ? states : 1;  // unrolled wholly, arrays over n are registers
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    selective_scan_kernel(SelectiveScanInputs<typename Traits::A, typename Traits::F> in, Sequences sequences,
                          Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> y,
                          Tensor<typename Traits::F, 3> checkpoints) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  const Index channels = in.u.cols(), N = in.B.shape[2];
  const Index tiles = (channels + Traits::threads - 1) / Traits::threads;
  const Index row = blockIdx.x / tiles, c = blockIdx.x % tiles * Traits::threads + threadIdx.x;
  if (c >= channels || sequences.length(row) == 0) return;
  const Index head = c / (channels / in.B.shape[1]);
  const Index begin = sequences.begin(row), end = begin + sequences.length(row);
  const F bias = in.delta_bias[c], skip = in.D[c];
  const bool continued = state && sequences.start(row) > 0;

  F a[Traits::states], s[Traits::states];
#pragma unroll Traits::unroll
  for (int n = 0; n < Traits::states; ++n) {
    a[n] = n < N ? -::exp(in.A_log(c, n)) : F(0);
    s[n] = continued && n < N ? state(row, n, c) : F(0);
  }
  const Index first_checkpoint = begin / scan_chunk + row;
  for (Index t = begin; t < end; ++t) {
    if (checkpoints && (t - begin) % scan_chunk == 0) {
      const Index k = first_checkpoint + (t - begin) / scan_chunk;
#pragma unroll Traits::unroll
      for (int n = 0; n < Traits::states; ++n)
        if (n < N) checkpoints(k, n, c) = s[n];
    }
    const A* B = &in.B(t, head, 0);
    const A* C = &in.C(t, head, 0);
    const F delta = F(in.delta(t, c)) + bias, u = F(in.u(t, c)), z = F(in.z(t, c));
    const F dt = delta > F(20) ? delta : ::log1p(::exp(delta)), dt_u = dt * u;
    F sum = skip * u;
#pragma unroll Traits::unroll
    for (int n = 0; n < Traits::states; ++n)
      if (n < N) {
        s[n] = ::exp(dt * a[n]) * s[n] + dt_u * F(B[n]);
        sum += s[n] * F(C[n]);
      }
    y(t, c) = A(sum * z / (F(1) + ::exp(-z)));
  }
  if (state) {
#pragma unroll Traits::unroll
    for (int n = 0; n < Traits::states; ++n)
      if (n < N) state(row, n, c) = s[n];
  }
}

}  // namespace detail

template <>
struct SelectiveScan<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                      Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    if (sequences.tokens == 0) return;
    const Index N = in.B.shape[2];
    require(N <= 256, "selective_scan: on CUDA d_state is at most 256, got ", N);
    if (N <= 16)
      launch<detail::SelectiveScanTraits<A, 16>>(ctx, in, sequences, state, y, checkpoints);
    else if (N <= 32)
      launch<detail::SelectiveScanTraits<A, 32>>(ctx, in, sequences, state, y, checkpoints);
    else
      launch<detail::SelectiveScanTraits<A, 256>>(ctx, in, sequences, state, y, checkpoints);
  }

 private:
  template <class Traits, class A, class F>
  static void launch(Context<cuda>& ctx, const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                     Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    const Index tiles = (in.u.cols() + Traits::threads - 1) / Traits::threads;
    const auto blocks = static_cast<unsigned>(sequences.rows * tiles);
    detail::selective_scan_kernel<Traits>
        <<<blocks, Traits::threads, 0, ctx.stream()>>>(in, sequences, state, y, checkpoints);
    detail::check_launch("selective_scan");
  }
};

}  // namespace zamba
