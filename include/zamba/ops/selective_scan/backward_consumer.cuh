// SPDX-License-Identifier: MIT
// Consumers of backward.cuh: states and adjoint states.
#pragma once

#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan/backward_stages.cuh>

namespace zamba::kernel {

/// A consumer: a slice of the states of two neighbouring channels. Warp w, lane l:
///   pair of channels of the tile   8 w + l % 8       (four neighbouring lanes are one part of dB and dC)
///   slice                          l / 8
template <class Traits>
struct ScanBackwardConsumer {
  static constexpr int states = Traits::states, group = Traits::group;
  using Shared = ScanBackwardShared<Traits>;

  Shared& shared;
  int thread, pair, slice, first_state;
  int mine[2];  // of each channel: states that there are
  Index channel;
  float a[2][states], d_a[2][states] = {};  // the decay's exponent, and the gradient of A
  float s[2][states], g[2][states];         // the state and its adjoint

  __device__ ScanBackwardConsumer(Shared& shared, int thread, const SelectiveScanInputs<typename Traits::A, float>& in,
                                  const ScanTile& tile)
      : shared(shared), thread(thread) {
    const int lane = thread % 32;
    pair = thread / 32 * 8 + lane % 8;
    slice = lane / 8;
    first_state = slice * states;
    channel = tile.channel + 2 * pair;
    const int there = ::min(::max(static_cast<int>(in.B.shape[2]) - first_state, 0), states);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      mine[c] = 2 * pair + c < tile.width ? there : 0;
#pragma unroll
      for (int n = 0; n < states; ++n)
        a[c][n] = n < mine[c] ? scan_decay(in.A_log(channel + c, first_state + n)) : 0.0f;
    }
  }

  template <class F>
  __device__ void load(const Matrix<F>& from, float (&to)[2][states]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n) to[c][n] = n < mine[c] ? from(first_state + n, channel + c) : 0.0f;
  }

  /// The adjoint of the state that a row ends with, or zero.
  __device__ void begin_row(const Tensor<float, 3>& d_state, Index row) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n) g[c][n] = 0;
    if (d_state) load(d_state[row], g);
  }

  /// That of the state that a row begins with, unless it begins anew.
  __device__ void end_row(const Tensor<float, 3>& d_state, Index row, bool continued) const {
    if (!d_state) return;
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n)
        if (n < mine[c]) d_state(row, first_state + n, channel + c) = continued ? g[c][n] : 0.0f;
  }

  __device__ void store_parameters(const Matrix<float>& to) const {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n)
        if (n < mine[c]) to(channel + c, first_state + n) = d_a[c][n];
  }

  /// Of a token: dt and dt u of each channel.
  struct Step {
    float dt[2], dt_u[2];
  };
  __device__ Step step(int token) const {
    const float4 both = shared.tokens[token].steps[Shared::step_place(pair)];
    return {{both.x, both.y}, {both.z, both.w}};
  }
  __device__ float decay(float dt, int c, int n) const { return exp2_approximate(dt * a[c][n]); }

  __device__ void keep_start(int index) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) store_vector(&shared.starts[index][c][thread].x, s[c]);
  }

  /// Scans so many groups, and keeps the states where they begin.
  template <int Groups>
  __device__ void scan(int index, int place) {
    Step steps[Groups * group];
    float B[Groups * group][states];
#pragma unroll
    for (int k = 0; k < Groups * group; ++k) {
      steps[k] = step(place + k);
      load_vector<4>(&shared.tokens[place + k].steps[Shared::B_place(slice)].x).unpack(B[k]);
    }
#pragma unroll
    for (int k = 0; k < Groups * group; ++k) {
      if (k % group == 0) keep_start(index + k / group);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int n = 0; n < states; ++n)
          s[c][n] = ::fmaf(decay(steps[k].dt[c], c, n), s[c][n], steps[k].dt_u[c] * B[k][n]);
    }
  }

  /// What is known of a group: of token k the operands, its decays, and states[k] before it.
  struct Group {
    Step steps[group];
    float d_y[group][2], B[group][states], C[group][states];
    float decays[group][2][states], states_at[group + 1][2][states];
  };

  /// The states of a group once more, and the sums of C s; `token` of the stage is its first.
  __device__ void scan_again(Group& at, int index, int place, int buffer, int token) {
#pragma unroll
    for (int c = 0; c < 2; ++c) load_vector<4>(&shared.starts[index][c][thread].x).unpack(at.states_at[0][c]);
#pragma unroll
    for (int k = 0; k < group; ++k) {
      at.steps[k] = step(place + k);
      load_vector<4>(&shared.tokens[place + k].steps[Shared::B_place(slice)].x).unpack(at.B[k]);
      load_vector<4>(&shared.outputs[buffer][token + k].C[slice].x).unpack(at.C[k]);
      load_vector<2>(&shared.outputs[buffer][token + k].d_y[2 * pair]).unpack(at.d_y[k]);
    }
#pragma unroll
    for (int k = 0; k < group; ++k) {
      float sums[2] = {};
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int n = 0; n < states; ++n) {
          at.decays[k][c][n] = decay(at.steps[k].dt[c], c, n);
          at.states_at[k + 1][c][n] =
              ::fmaf(at.decays[k][c][n], at.states_at[k][c][n], at.steps[k].dt_u[c] * at.B[k][n]);
          sums[c] = ::fmaf(at.states_at[k + 1][c][n], at.C[k][n], sums[c]);
        }
      leave(buffer, token + k, Shared::C_s, sums);
    }
  }

  /// The adjoint state from the end of a group to its beginning, and what comes of it.
  __device__ void adjoin(const Group& at, int buffer, int token) {
    ChannelSums<Traits::exact> d_B, d_C;
#pragma unroll
    for (int k = group - 1; k >= 0; --k) {
      float g_B[2] = {}, d_dt[2] = {};
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int n = 0; n < states; ++n) {
          g[c][n] = ::fmaf(at.d_y[k][c], at.C[k][n], g[c][n]);
          g_B[c] = ::fmaf(g[c][n], at.B[k][n], g_B[c]);
        }
      d_B.add(k, at.steps[k].dt_u, g);
      d_C.add(k, at.d_y[k], at.states_at[k + 1]);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int n = 0; n < states; ++n) {
          g[c][n] *= at.decays[k][c][n];
          const float through_decay = g[c][n] * at.states_at[k][c][n];
          d_dt[c] = ::fmaf(through_decay, a[c][n], d_dt[c]);
          d_a[c][n] = ::fmaf(through_decay, at.steps[k].dt[c], d_a[c][n]);
        }
      leave(buffer, token + k, Shared::g_B, g_B);
      leave(buffer, token + k, Shared::d_dt, d_dt);
    }
    const int part = thread / 4 % 2 + thread / 32 * 2, mine = token + thread % 4;
    auto& parts = shared.outputs[buffer][mine].parts[part];
    parts[Shared::part_place(slice, part)] = d_B.take();
    parts[Shared::part_place(Traits::slices + slice, part)] = d_C.take();
  }

  __device__ void leave(int buffer, int token, typename Shared::Sum which, const float (&sums)[2]) const {
    store_vector(&shared.outputs[buffer][token].sums[which][pair / 8][slice * 16 + 2 * pair % 16], sums);
  }

  /// Of a stage whose first token has this place.
  __device__ void adjoin_stage(int stage, int place, int buffer) {
#pragma unroll
    for (int i = Traits::groups - 1; i >= 0; --i) {
      Group at;
      scan_again(at, stage * Traits::groups + i, place + i * group, buffer, i * group);
      adjoin(at, buffer, i * group);
    }
  }

  /// A row, from `g` of its end to that of its beginning. checkpoints: from the row's first on.
  __device__ void through_row(const ScanChunks<Traits>& chunks, const Tensor<const float, 3>& checkpoints, Index first,
                              int& buffer) {
    load(checkpoints[first + chunks.count - 1], s);
    __syncthreads();  // the first stages are prepared
    for (int chunk = chunks.count - 1; chunk >= 0; --chunk) {
      const int turn = chunks.turn(chunk), last = chunks.stages(chunk) - 1;
      for (int stage = 0; stage < last; ++stage)
        scan<Traits::groups>(stage * Traits::groups, Shared::place(turn, stage));
      __syncthreads();  // the last stage is prepared, that of the chunk before finished
      scan<Traits::groups - 1>(last * Traits::groups, Shared::place(turn, last));
      keep_start(last * Traits::groups + Traits::groups - 1);
      if (chunk > 0) load(checkpoints[first + chunk - 1], s);  // arrives meanwhile
      for (int stage = last; stage >= 0; --stage, buffer ^= 1) {
        adjoin_stage(stage, Shared::place(turn, stage), buffer);
        __syncthreads();  // the stage can be finished
      }
    }
  }
};

}  // namespace zamba::kernel
