// SPDX-License-Identifier: MIT
// selective_scan on CUDA in float for single tokens and up to 32 states, which the states' memory bounds; the sums are
// those of scan_rows.cuh.
#pragma once

#include <zamba/detail/launch.cuh>
#include <zamba/detail/scan_parts.cuh>
#include <zamba/ops/selective_scan.hpp>

namespace zamba::detail {

/// Four slices of States_ states, one a warp, of 32 channels, one a lane, of Rows_ rows.
template <class A_, int States_, bool Wide_, int Rows_>
struct ScanTokenTraits {
  using A = A_;
  static constexpr int slices = 4, states = States_, rows = Rows_;
  static constexpr bool wide = Wide_;
  static constexpr int channels = 32, threads = channels * slices;
};

/// Single tokens: a warp takes a slice of 32 channels of some rows, of which all loads are issued before the first
/// result.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    selective_scan_token_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                                Tensor<float, 3> state, Matrix<typename Traits::A> y) {
  using A = typename Traits::A;
  constexpr int Rows = Traits::rows, slices = Traits::slices, states = Traits::states;
  __shared__ float sums[Rows][slices][Traits::channels];
  const ScanTile tile = scan_tile(in, Traits::channels);
  const int slice = threadIdx.x / 32, lane = threadIdx.x % 32, N = static_cast<int>(in.B.shape[2]);
  const Index c = tile.channel + lane, first_state = slice * states;
  const int mine = lane < tile.width ? ::min(::max(N - slice * states, 0), states) : 0;

  Index rows[Rows], at[Rows];
  bool there[Rows];
  float s[Rows][states], u[Rows], delta[Rows], z[Rows];
  FourActivations<A> B[Rows][states / 4], C[Rows][states / 4];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    rows[r] = tile.row * Rows + r;
    there[r] = rows[r] < sequences.rows && sequences.length(rows[r]) > 0;
    at[r] = there[r] ? sequences.begin(rows[r]) : 0;
    const bool continued = there[r] && state && sequences.start(rows[r]) > 0;
#pragma unroll
    for (int n = 0; n < states; ++n) s[r][n] = continued && n < mine ? state(rows[r], first_state + n, c) : 0.0f;
    const bool read = there[r] && lane < tile.width;
    u[r] = read ? float(in.u(at[r], c)) : 0.0f;
    delta[r] = read ? float(in.delta(at[r], c)) : 0.0f;
    z[r] = read && slice == 0 ? float(in.z(at[r], c)) : 0.0f;
#pragma unroll
    for (int n = 0; n < states; n += 4) {
      const int width = there[r] ? ::min(N - slice * states - n, 4) : 0;
      B[r][n / 4] = load_four<Traits::wide>(&in.B(at[r], tile.head, first_state + n), width);
      C[r][n / 4] = load_four<Traits::wide>(&in.C(at[r], tile.head, first_state + n), width);
    }
  }
  float a[states];
#pragma unroll
  for (int n = 0; n < states; n += 4) {
    const auto four = load_four<Traits::wide>(&in.A_log(c, first_state + n), ::min(mine - n, 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) a[n + i] = n + i < mine ? scan_decay(four[i]) : 0.0f;
  }
  const float bias = mine ? in.delta_bias[c] : 0.0f, skip = mine && slice == 0 ? in.D[c] : 0.0f;

#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const float dt = scan_softplus(delta[r] + bias);
    float b[states], w[states];
#pragma unroll
    for (int n = 0; n < states; ++n) b[n] = B[r][n / 4][n % 4], w[n] = C[r][n / 4][n % 4];
    sums[r][slice][lane] = scan_step<states>(dt, dt * u[r], b, w, a, s[r]);
    if (there[r] && state) {
#pragma unroll
      for (int n = 0; n < states; ++n)
        if (n < mine) state(rows[r], first_state + n, c) = s[r][n];
    }
  }
  __syncthreads();
  if (slice != 0 || lane >= tile.width) return;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    if (!there[r]) continue;
    float parts[slices];
#pragma unroll
    for (int k = 0; k < slices; ++k) parts[k] = sums[r][k][lane];
#pragma unroll
    for (int half = 1; half < slices; half *= 2)
#pragma unroll
      for (int k = 0; k < slices; k += 2 * half) parts[k] += parts[k + half];
    y(at[r], c) = A(scan_output(parts[0], skip, u[r], z[r]));
  }
}

}  // namespace zamba::detail
