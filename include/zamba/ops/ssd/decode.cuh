// SPDX-License-Identifier: MIT
// The recurrent form of ssd on CUDA, from a row's first token to its last: decoding (the selective state update of
// Mamba's kernels), and whatever the chunk scan does not take.
//
// Neighbouring channels are a warp's neighbouring lanes, so that the state (N, D) is read and written in whole lines;
// some lanes share the states of a channel, 16 a lane in registers, and their sums meet in a fixed order.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/ops/ssd.hpp>

namespace zamba::kernel {

/// Lanes_ lanes share Width_ neighbouring channels of at most 16 Lanes_ states.
template <class A_, int Lanes_, int Width_>
struct SsdDecodeTraits {
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

/// Rows of at most `longest` tokens. Blocks: the channels of a row in turn, then rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_decode_kernel(SsdInputs<typename Traits::A, typename Traits::F> in, Sequences sequences,
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
  const Index first = lane / (32 / Traits::lanes) * Traits::states;  // of this lane's states
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

  States s[Traits::states];  // (states, width) of this lane
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

}  // namespace zamba::kernel
