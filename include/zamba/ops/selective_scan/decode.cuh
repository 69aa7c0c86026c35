// SPDX-License-Identifier: MIT
// selective_scan on CUDA in float for single tokens and up to 32 states: one step of the recurrence a row, on states in
// global memory. The sums are those of prefill.cuh.
//
// Reading and writing the states bounds it. A warp keeps a tile of channels, whose A_log it reads once, and goes over
// some rows, of which the next is on its way while one is computed (kernel/single_tokens.cuh). All warps are on the GPU
// at once (a persistent grid), so none waits for another to end.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/single_tokens.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/step.cuh>

namespace zamba::kernel {

/// Four slices of States_ states by eight groups of neighbouring channels, a lane each. Wide_: as in prefill.cuh, and
/// all rows of the states likewise; then a group is four channels, otherwise one.
template <class A_, int States_, bool Wide_>
struct ScanTokenTraits {
  using A = A_;
  static constexpr bool wide = Wide_;
  static constexpr int slices = 4, states = States_, across = wide ? 4 : 1;
  static constexpr int warps = 2, threads = 32 * warps;
  static constexpr int groups = 32 / slices, warp_channels = groups * across, channels = warps * warp_channels;
  // Of a multiprocessor, at least: as many as leave registers for two rows.
  static constexpr int blocks = states > 4 ? 5 : sizeof(A) > 2 ? 8 : 10;
};

/// A lane: `across` channels of a head from c on, by a slice of their states.
template <class Traits>
struct ScanTokenLane {
  using A = typename Traits::A;
  static constexpr int states = Traits::states, across = Traits::across, groups = Traits::groups;
  static constexpr bool wide = Traits::wide;
  static constexpr unsigned all = ~0u;
  using Inputs = SelectiveScanInputs<A, float>;

  Index head, c;
  int slice, first_state;
  int width;     // channels that there are
  int of_slice;  // states that there are in the slice
  int mine;      // and in the lane: none where it has no channel
  int own;       // of its channels, the one whose output the lane finishes
  bool finishes;
  float a[across][states], bias[across], skip;

  __device__ ScanTokenLane(const Inputs& in, const ScanTile& tile) : head(tile.head) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, N = static_cast<int>(in.B.shape[2]);
    slice = lane / groups;
    const int offset = warp * Traits::warp_channels + lane % groups * across;
    first_state = slice * states;
    width = ::min(::max(tile.width - offset, 0), across);
    of_slice = ::min(::max(N - first_state, 0), states);
    mine = width > 0 ? of_slice : 0;
    c = tile.channel + offset;
    own = wide ? slice : 0;
    finishes = width > 0 && (wide || slice == 0);
  }

  __device__ void prefetch(const Tensor<float, 3>& state, Index row) const {
#pragma unroll
    for (int n = 0; n < states; ++n)
      if (n < mine) prefetch_to_cache(&state(row, first_state + n, c));
  }

  __device__ void load_weights(const Inputs& in) {
#pragma unroll
    for (int i = 0; i < across; ++i) {
#pragma unroll
      for (int n = 0; n < states; n += 4) {
        const auto A_log = load_vector_masked<4, wide>(&in.A_log(c + i, first_state + n), ::min(mine - n, 4));
#pragma unroll
        for (int k = 0; k < 4; ++k) a[i][n + k] = n + k < mine ? scan_decay(A_log[k]) : 0.0f;
      }
      bias[i] = i < width ? in.delta_bias[c + i] : 0.0f;
    }
    skip = finishes ? in.D[c + own] : 0.0f;
  }

  /// What the step of a row reads.
  struct Operands {
    Index token;
    AlignedVector<float, 4> s[states];                 //                  state, channels
    AlignedVector<A, 4> u, delta;                      //                  channels
    AlignedVector<A, 4> B[states / 4], C[states / 4];  //   states
    A z;
  };
  __device__ Operands load(const Inputs& in, const Tensor<float, 3>& state, Index row, Index token,
                           bool continued) const {
    Operands read;
    read.token = token;
    const int past = continued ? mine : 0;
#pragma unroll
    for (int n = 0; n < states; ++n)
      read.s[n] = load_vector_masked<4, wide>(&state(row, first_state + n, c), n < past ? width : 0);
    read.u = load_vector_masked<4, wide>(&in.u(token, c), width);
    read.delta = load_vector_masked<4, wide>(&in.delta(token, c), width);
    read.z = finishes ? in.z(token, c + own) : A(0.0f);
#pragma unroll
    for (int n = 0; n < states; n += 4) {
      const int count = ::min(of_slice - n, 4);
      read.B[n / 4] = load_vector_masked<4, wide>(&in.B(token, head, first_state + n), count);
      read.C[n / 4] = load_vector_masked<4, wide>(&in.C(token, head, first_state + n), count);
    }
    return read;
  }

  /// Takes the state of a row one token further, and gives y.
  __device__ void step(const Operands& read, const Tensor<float, 3>& state, Index row, const Matrix<A>& y) const {
    float B[states], C[states], u[across], s[across][states], sums[across];
#pragma unroll
    for (int n = 0; n < states; ++n) B[n] = read.B[n / 4][n % 4], C[n] = read.C[n / 4][n % 4];
#pragma unroll
    for (int i = 0; i < across; ++i) {
#pragma unroll
      for (int n = 0; n < states; ++n) s[i][n] = read.s[n][i];
      const float dt = scan_softplus(read.delta[i] + bias[i]);
      u[i] = read.u[i];
      sums[i] = scan_step<states>(dt, dt * u[i], B, C, a[i], s[i]);
    }
    if (state) {
#pragma unroll
      for (int n = 0; n < states; ++n) {
        float values[4]{};
#pragma unroll
        for (int i = 0; i < across; ++i) values[i] = s[i][n];
        store_vector_masked<wide>(&state(row, first_state + n, c), values, n < mine ? width : 0);
      }
    }
    const float sum = over_slices(sums);
    float own_u = u[0];
#pragma unroll
    for (int i = 1; i < across; ++i) own_u = own == i ? u[i] : own_u;
    if (finishes) y(read.token, c + own) = A(scan_output(sum, skip, own_u, float(read.z)));
  }

  /// The sum of C s of the lane's own channel over the slices: neighbouring slices, then these sums. Of four channels,
  /// two exchanges leave each lane the one that it finishes (a butterfly, of half as many values each time).
  __device__ float over_slices(const float (&sums)[across]) const {
    if constexpr (wide) {
      const bool odd = slice % 2, upper = slice / 2;
      const float low = __shfl_xor_sync(all, odd ? sums[0] : sums[1], groups);
      const float high = __shfl_xor_sync(all, odd ? sums[2] : sums[3], groups);
      const float pairs[] = {(odd ? sums[1] : sums[0]) + low, (odd ? sums[3] : sums[2]) + high};
      return (upper ? pairs[1] : pairs[0]) + __shfl_xor_sync(all, upper ? pairs[0] : pairs[1], 2 * groups);
    } else {
      const float pair = sums[0] + __shfl_xor_sync(all, sums[0], groups);
      return pair + __shfl_xor_sync(all, pair, 2 * groups);
    }
  }
};

/// Single tokens of `rows_each` rows, at most SingleTokens::most_rows, in a tile of channels.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_token_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                                Tensor<float, 3> state, Matrix<typename Traits::A> y, int rows_each) {
  using Lane = ScanTokenLane<Traits>;
  launch_dependents();
  const ScanTile tile = scan_tile(in, Traits::channels);
  const Index first = tile.row * rows_each;
  Lane lane(in, tile);
  if (state) lane.prefetch(state, first);
  lane.load_weights(in);
  grid_dependency_wait();
  const SingleTokens rows(sequences, first, rows_each, static_cast<bool>(state));
  rows.for_each([&](int row) { return lane.load(in, state, first + row, rows.token(row), rows.continued(row)); },
                [&](int row, const typename Lane::Operands& read) { lane.step(read, state, first + row, y); });
}

}  // namespace zamba::kernel
