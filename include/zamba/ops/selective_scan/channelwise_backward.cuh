// SPDX-License-Identifier: MIT
// The backward pass of selective_scan on CUDA for any type and any number of states, by one thread a channel; equations
// and partial sums as in backward.cuh. A warp takes 32 neighbouring channels of a head, and in every chunk one state
// after the other, whose values at the chunk's tokens lie in shared memory. dB and dC are summed over its lanes by a
// butterfly.
#pragma once

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/backward.cuh>

namespace zamba::kernel {

template <class A_>
struct ChannelBackwardTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 32, channels = threads, chunk = static_cast<int>(scan_chunk);
  static constexpr int BC_scale = 1;
};

/// Of the tokens of a chunk, (token, channel).
template <class Traits>
struct ChannelBackwardShared {
  using Values = typename Traits::F[Traits::chunk][Traits::channels];
  Values dt, u, dyp;       // of the inputs
  Values states;           // one state, before each token
  Values y, g_B, through;  // sums over n: C s, g B, g A exp(dt A) s
};

/// One channel of a head.
template <class Traits>
struct ChannelBackward {
  using A = typename Traits::A;
  using F = typename Traits::F;
  using Inputs = SelectiveScanInputs<A, F>;
  using Gradients = SelectiveScanGradients<A, F>;

  ChannelBackwardShared<Traits>& shared;
  const Inputs& in;
  Index head, c;
  int lane;
  bool there;  // whether there is such a channel
  F bias, skip, d_bias = 0, d_skip = 0;

  __device__ ChannelBackward(ChannelBackwardShared<Traits>& shared, const Inputs& in, const ScanTile& tile)
      : shared(shared), in(in), head(tile.head), lane(static_cast<int>(threadIdx.x)) {
    c = tile.channel + lane;
    there = lane < tile.width;
    bias = there ? in.delta_bias[c] : F(0);
    skip = there ? in.D[c] : F(0);
  }

  __device__ static F sigmoid(F x) { return F(1) / (F(1) + ::exp(-x)); }

  __device__ void load(Index first, int count, const Matrix<const A>& d_y) {
    for (int t = 0; t < count; ++t) {
      const F delta = there ? F(in.delta(first + t, c)) + bias : F(0), z = there ? F(in.z(first + t, c)) : F(0);
      shared.dt[t][lane] = !there ? F(0) : delta > F(20) ? delta : ::log1p(::exp(delta));
      shared.u[t][lane] = there ? F(in.u(first + t, c)) : F(0);
      shared.dyp[t][lane] = there ? F(d_y(first + t, c)) * z * sigmoid(z) : F(0);
      shared.y[t][lane] = skip * shared.u[t][lane];
      shared.g_B[t][lane] = shared.through[t][lane] = 0;
    }
  }

  /// State n through a chunk and back, from the state s before it. The adjoint g and the gradient of A are advanced.
  __device__ void through(Index first, int count, int n, F s, const Matrix<F>& part, F& g, F& d_a) {
    const int N = static_cast<int>(in.B.shape[2]);
    const F a = there ? -::exp(in.A_log(c, n)) : F(0);
    for (int t = 0; t < count; ++t) {
      const F dt = shared.dt[t][lane];
      shared.states[t][lane] = s;
      s = ::exp(dt * a) * s + dt * shared.u[t][lane] * F(in.B(first + t, head, n));
      shared.y[t][lane] += s * F(in.C(first + t, head, n));
    }
    for (int t = count - 1; t >= 0; --t) {
      const F dt = shared.dt[t][lane], dyp = shared.dyp[t][lane];
      g += dyp * F(in.C(first + t, head, n));
      F d_B = g * dt * shared.u[t][lane], d_C = dyp * s;
#pragma unroll
      for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        d_B += __shfl_xor_sync(0xffffffffu, d_B, distance);
        d_C += __shfl_xor_sync(0xffffffffu, d_C, distance);
      }
      if (lane == 0) {
        part(first + t, n) = d_B;
        part(first + t, N + n) = d_C;
      }
      shared.g_B[t][lane] += g * F(in.B(first + t, head, n));
      s = shared.states[t][lane];
      g *= ::exp(dt * a);
      shared.through[t][lane] += g * s * a;
      d_a += g * s * dt;
    }
  }

  __device__ void finish(Index first, int count, const Matrix<const A>& d_y, const Gradients& out) {
    if (!there) return;
    for (int t = 0; t < count; ++t) {
      const F delta = F(in.delta(first + t, c)) + bias, z = F(in.z(first + t, c)), gate = sigmoid(z);
      const F u = shared.u[t][lane], dyp = shared.dyp[t][lane], g_B = shared.g_B[t][lane];
      const F d_delta = (shared.through[t][lane] + g_B * u) * (delta > F(20) ? F(1) : sigmoid(delta));
      out.u(first + t, c) = A(g_B * shared.dt[t][lane] + dyp * skip);
      out.delta(first + t, c) = A(d_delta);
      out.z(first + t, c) = A(F(d_y(first + t, c)) * shared.y[t][lane] * gate * (F(1) + z * (F(1) - gate)));
      d_skip += dyp * u;
      d_bias += d_delta;
    }
  }
};

/// Rows blockIdx.x / tiles * rows_each and on, of a tile of channels.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    channel_backward_kernel(SelectiveScanInputs<typename Traits::A, typename Traits::F> in,
                            Matrix<const typename Traits::A> d_y, Sequences sequences,
                            Tensor<const typename Traits::F, 3> checkpoints,
                            SelectiveScanGradients<typename Traits::A, typename Traits::F> out,
                            Tensor<typename Traits::F, 3> d_state, ScanPartials<typename Traits::F> partials,
                            Index rows_each) {
  using F = typename Traits::F;
  constexpr Index chunk = Traits::chunk;
  extern __shared__ double channel_backward_memory[];
  launch_dependents();
  grid_dependency_wait();
  const ScanTile tile = scan_tile(in, Traits::channels);
  ChannelBackward<Traits> channel(*reinterpret_cast<ChannelBackwardShared<Traits>*>(channel_backward_memory), in, tile);
  const int N = static_cast<int>(in.B.shape[2]);
  const Index c = channel.c, first_row = tile.row * rows_each;
  const Matrix<F> part = partials.BC[blockIdx.x % static_cast<unsigned>(partials.BC.shape[0])];
  const Matrix<F> parameters = partials.parameters[tile.row], g = partials.adjoints[tile.row];
  if (channel.there)
    for (int n = 0; n < N; ++n) parameters(c, n) = 0;
  for (Index row = first_row; row < ::min(first_row + rows_each, sequences.rows); ++row) {
    const Index begin = sequences.begin(row), length = sequences.length(row);
    if (length == 0) continue;
    if (channel.there)
      for (int n = 0; n < N; ++n) g(n, c) = d_state ? d_state(row, n, c) : F(0);
    for (Index k = (length - 1) / chunk; k >= 0; --k) {
      const Index first = begin + k * chunk;
      const int count = static_cast<int>(::min(chunk, length - k * chunk));
      channel.load(first, count, d_y);
      for (int n = 0; n < N; ++n) {
        F at = channel.there ? g(n, c) : F(0), d_a = channel.there ? parameters(c, n) : F(0);
        const F s = channel.there ? checkpoints(begin / chunk + row + k, n, c) : F(0);
        channel.through(first, count, n, s, part, at, d_a);
        if (channel.there) g(n, c) = at, parameters(c, n) = d_a;
      }
      channel.finish(first, count, d_y, out);
    }
    if (d_state && channel.there)  // a row that began from zero has no initial state to receive a gradient
      for (int n = 0; n < N; ++n) d_state(row, n, c) = sequences.start(row) > 0 ? g(n, c) : F(0);
  }
  if (!channel.there) return;
  parameters(c, N) = channel.d_skip;
  parameters(c, N + 1) = channel.d_bias;
}

}  // namespace zamba::kernel
