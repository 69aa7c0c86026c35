// SPDX-License-Identifier: MIT
// selective_scan on CUDA in float for single tokens and up to 32 states; the sums are those of scan_rows.cuh.
//
// Reading and writing the states bounds it. A warp keeps a tile of channels, whose A_log it reads once, and goes over
// some rows, of which the next is on its way while one is computed. All warps are on the GPU at once, so none waits for
// another to end.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/step.cuh>

namespace zamba::kernel {

/// Four slices of States_ states by eight groups of neighbouring channels, a lane each. Wide_: as in scan_rows.cuh, and
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
  static constexpr int most_rows = 32;  // of a warp: a lane knows the place of one
};

/// Single tokens of `rows_each` rows, at most Traits::most_rows, in a tile of channels.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_token_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                                Tensor<float, 3> state, Matrix<typename Traits::A> y, int rows_each) {
  using A = typename Traits::A;
  constexpr int states = Traits::states, across = Traits::across, groups = Traits::groups;
  constexpr bool wide = Traits::wide;
  constexpr unsigned all = ~0u;
  launch_dependents();
  const ScanTile tile = scan_tile(in, Traits::channels);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = lane / groups;
  const int offset = warp * Traits::warp_channels + lane % groups * across;
  const int N = static_cast<int>(in.B.shape[2]), first_state = slice * states;
  const int width = ::min(::max(tile.width - offset, 0), across);  // channels of this lane
  const int of_slice = ::min(::max(N - first_state, 0), states), mine = width > 0 ? of_slice : 0;
  const Index c = tile.channel + offset;
  // What a lane finishes: of four channels, the one of its slice.
  const int own = wide ? slice : 0;
  const bool finishes = width > 0 && (wide || slice == 0);

  const Index first = tile.row * rows_each, row_of_lane = first + lane;
  if (state) {
#pragma unroll
    for (int n = 0; n < states; ++n)
      if (n < mine) prefetch_to_cache(&state(first, first_state + n, c));
  }

  float a[across][states], bias[across];
#pragma unroll
  for (int i = 0; i < across; ++i) {
#pragma unroll
    for (int n = 0; n < states; n += 4) {
      const auto four = load_vector_masked<4, wide>(&in.A_log(c + i, first_state + n), ::min(mine - n, 4));
#pragma unroll
      for (int k = 0; k < 4; ++k) a[i][n + k] = n + k < mine ? scan_decay(four[k]) : 0.0f;
    }
    bias[i] = i < width ? in.delta_bias[c + i] : 0.0f;
  }
  const float skip = finishes ? in.D[c + own] : 0.0f;
  grid_dependency_wait();

  const bool known = lane < rows_each && row_of_lane < sequences.rows;
  const Index begin = known ? sequences.begin(row_of_lane) : 0, length = known ? sequences.length(row_of_lane) : 0;
  const Index start = known && state ? sequences.start(row_of_lane) : 0;
  const unsigned continued = __ballot_sync(all, start > 0);
  unsigned left = __ballot_sync(all, length > 0);  // rows with a token, the first of them next

  struct Operands {
    Index at;
    AlignedVector<float, 4> s[states];
    AlignedVector<A, 4> u, delta, B[states / 4], C[states / 4];
    A z;
  };
  const auto load = [&](int r) {
    Operands read;
    read.at = __shfl_sync(all, begin, r);
    const int past = continued >> r & 1 ? mine : 0;
#pragma unroll
    for (int n = 0; n < states; ++n)
      read.s[n] = load_vector_masked<4, wide>(&state(first + r, first_state + n, c), n < past ? width : 0);
    read.u = load_vector_masked<4, wide>(&in.u(read.at, c), width);
    read.delta = load_vector_masked<4, wide>(&in.delta(read.at, c), width);
    read.z = finishes ? in.z(read.at, c + own) : A(0.0f);
#pragma unroll
    for (int n = 0; n < states; n += 4) {
      const int count = ::min(of_slice - n, 4);
      read.B[n / 4] = load_vector_masked<4, wide>(&in.B(read.at, tile.head, first_state + n), count);
      read.C[n / 4] = load_vector_masked<4, wide>(&in.C(read.at, tile.head, first_state + n), count);
    }
    return read;
  };
  const auto step = [&](int r, const Operands& read) {
    float B[states], C[states], s[across][states], sums[across];
#pragma unroll
    for (int n = 0; n < states; ++n) B[n] = read.B[n / 4][n % 4], C[n] = read.C[n / 4][n % 4];
#pragma unroll
    for (int i = 0; i < across; ++i) {
#pragma unroll
      for (int n = 0; n < states; ++n) s[i][n] = read.s[n][i];
      const float dt = scan_softplus(read.delta[i] + bias[i]);
      sums[i] = scan_step<states>(dt, dt * read.u[i], B, C, a[i], s[i]);
    }
    if (state) {
#pragma unroll
      for (int n = 0; n < states; ++n) {
        float values[4]{};
#pragma unroll
        for (int i = 0; i < across; ++i) values[i] = s[i][n];
        store_vector_masked<wide>(&state(first + r, first_state + n, c), values, n < mine ? width : 0);
      }
    }
    // Neighbouring slices, then these sums, of which a lane keeps those that it finishes.
    float u = read.u[0];
    if constexpr (wide) {
      const bool odd = slice % 2, upper = slice / 2;
      const float low = __shfl_xor_sync(all, odd ? sums[0] : sums[1], groups);
      const float high = __shfl_xor_sync(all, odd ? sums[2] : sums[3], groups);
      const float pairs[] = {(odd ? sums[1] : sums[0]) + low, (odd ? sums[3] : sums[2]) + high};
      sums[0] = (upper ? pairs[1] : pairs[0]) + __shfl_xor_sync(all, upper ? pairs[0] : pairs[1], 2 * groups);
#pragma unroll
      for (int i = 1; i < across; ++i) u = own == i ? read.u[i] : u;
    } else {
      sums[0] += __shfl_xor_sync(all, sums[0], groups);
      sums[0] += __shfl_xor_sync(all, sums[0], 2 * groups);
    }
    if (finishes) y(read.at, c + own) = A(scan_output(sums[0], skip, u, float(read.z)));
  };

  Operands next{};
  if (left) next = load(__ffs(left) - 1);
  while (left) {
    const Operands now = next;
    const int r = __ffs(left) - 1;
    left &= left - 1;
    if (left) next = load(__ffs(left) - 1);
    step(r, now);
  }
}

}  // namespace zamba::kernel
