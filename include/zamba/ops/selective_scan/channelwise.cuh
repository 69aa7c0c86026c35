// SPDX-License-Identifier: MIT
// selective_scan on CUDA by one thread a channel: in double, and for more than 32 states.
#pragma once

#include <zamba/number.hpp>
#include <zamba/ops/selective_scan.hpp>

namespace zamba::kernel {

/// The constants of a scan by one thread a channel, of activations A_ with at most States_ states.
template <class A_, int States_>
struct ChannelScanTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int states = States_;
  static constexpr int threads = 64;
  static constexpr int unroll = states <= 32 ? states : 1;  // unrolled wholly, arrays over n are registers
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    channel_scan_kernel(SelectiveScanInputs<typename Traits::A, typename Traits::F> in, Sequences sequences,
                        Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> y,
                        Tensor<typename Traits::F, 3> checkpoints) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  const Index channels = in.u.cols(), N = in.B.shape[2];
  const Index tiles = ceil_div(channels, Traits::threads);
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

}  // namespace zamba::kernel
