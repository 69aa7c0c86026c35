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

  /// Of a token: dt and dt u of each channel, B.
  struct Step {
    float dt[2], dt_u[2], B[states];
  };
  __device__ Step read_step(int slot, int token) const {
    const auto& from = shared.tokens[slot][token].steps;
    const float4 both = from[Shared::step_place(pair)], B = from[Shared::B_place(slice)];
    return {{both.x, both.y}, {both.z, both.w}, {B.x, B.y, B.z, B.w}};
  }
  __device__ float decay(float dt, int c, int n) const { return exp2_approximate(dt * a[c][n]); }

  __device__ void keep_start(int place) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) store_vector(&shared.starts[place][c][thread].x, s[c]);
  }

  __device__ void scan(const Step& step) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n) s[c][n] = ::fmaf(decay(step.dt[c], c, n), s[c][n], step.dt_u[c] * step.B[n]);
  }

  /// Scans a stage, and keeps the states where its groups begin.
  __device__ void scan_stage(int turn, int stage, int slot) {
#pragma unroll
    for (int i = 0; i < Traits::groups; ++i) {
      Step steps[group];
#pragma unroll
      for (int k = 0; k < group; ++k) steps[k] = read_step(slot, i * group + k);
      keep_start(Shared::start_place(turn, stage * Traits::groups + i));
#pragma unroll
      for (int k = 0; k < group; ++k) scan(steps[k]);
    }
  }

  /// What is known of a group: of token k the operands, its decays, and states[k] before it.
  struct Group {
    Step steps[group];
    float d_y[group][2], C[group][states];
    float decays[group][2][states], states_at[group + 1][2][states];
  };

  __device__ void read(Group& at, int start, int slot, int buffer, int token) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) load_vector<4>(&shared.starts[start][c][thread].x).unpack(at.states_at[0][c]);
#pragma unroll
    for (int k = 0; k < group; ++k) {
      const auto& output = shared.outputs[buffer][token + k];
      at.steps[k] = read_step(slot, token + k);
      load_vector<4>(&output.C[slice].x).unpack(at.C[k]);
      load_vector<2>(&output.d_y[2 * pair]).unpack(at.d_y[k]);
    }
  }

  /// The states of token k of a group once more, and the sums of C s.
  __device__ void scan_again(Group& at, int k, int buffer, int token) const {
    const Step& step = at.steps[k];
    float sums[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n) {
        at.decays[k][c][n] = decay(step.dt[c], c, n);
        at.states_at[k + 1][c][n] = ::fmaf(at.decays[k][c][n], at.states_at[k][c][n], step.dt_u[c] * step.B[n]);
        sums[c] = ::fmaf(at.states_at[k + 1][c][n], at.C[k][n], sums[c]);
      }
    leave(buffer, token + k, Shared::C_s, sums);
  }

  using Sums = ChannelSums<Traits::exact>;
  /// The adjoint state from after token k of a group to before it, and what comes of it.
  __device__ void adjoin(const Group& at, int k, int buffer, int token, Sums& d_B, Sums& d_C) {
    const Step& step = at.steps[k];
    float g_B[2] = {}, d_dt[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n) {
        g[c][n] = ::fmaf(at.d_y[k][c], at.C[k][n], g[c][n]);
        g_B[c] = ::fmaf(g[c][n], step.B[n], g_B[c]);
      }
    d_B.add(k, step.dt_u, g);
    d_C.add(k, at.d_y[k], at.states_at[k + 1]);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int n = 0; n < states; ++n) {
        g[c][n] *= at.decays[k][c][n];
        const float through_decay = g[c][n] * at.states_at[k][c][n];
        d_dt[c] = ::fmaf(through_decay, a[c][n], d_dt[c]);
        d_a[c][n] = ::fmaf(through_decay, step.dt[c], d_a[c][n]);
      }
    leave(buffer, token + k, Shared::g_B, g_B);
    leave(buffer, token + k, Shared::d_dt, d_dt);
  }

  __device__ void leave(int buffer, int token, typename Shared::Sum which, const float (&sums)[2]) const {
    store_vector(&shared.outputs[buffer][token].sums[which][Shared::sum_place(2 * pair, slice)], sums);
  }
  __device__ void leave(int buffer, int token, const Sums& d_B, const Sums& d_C) const {
    const int part = thread / 4 % 2 + thread / 32 * 2;
    auto& parts = shared.outputs[buffer][token + thread % 4].parts[part];
    parts[Shared::part_place(slice, part)] = d_B.take();
    parts[Shared::part_place(Traits::slices + slice, part)] = d_C.take();
  }

  /// The adjoints of a stage, and meanwhile, token by token, the scan of a stage of the chunk before: each waits for
  /// exps or for sums where the other does not.
  __device__ void adjoin_stage(int turn, int stage, int slot, int buffer, int next_stage, int next_slot) {
#pragma unroll
    for (int i = 0; i < Traits::groups; ++i) {
      const int mine = Traits::groups - 1 - i, token = mine * group;
      Group at;
      Step next[group];
      Sums d_B, d_C;
      read(at, Shared::start_place(turn, stage * Traits::groups + mine), slot, buffer, token);
#pragma unroll
      for (int k = 0; k < group; ++k) next[k] = read_step(next_slot, i * group + k);
      keep_start(Shared::start_place(turn + 1, next_stage * Traits::groups + i));
#pragma unroll
      for (int k = 0; k < group; ++k) scan_again(at, k, buffer, token);
#pragma unroll
      for (int k = group - 1; k >= 0; --k) {
        adjoin(at, k, buffer, token, d_B, d_C);
        scan(next[group - 1 - k]);
      }
      leave(buffer, token, d_B, d_C);
    }
  }

  /// A row, from `g` of its end to that of its beginning. checkpoints: from the row's first on.
  __device__ void through_row(const ScanChunks<Traits>& chunks, const Tensor<const float, 3>& checkpoints, Index first,
                              int& buffer) {
    const int last = chunks.count - 1;
    ScanSlots<Traits> slots(chunks.stages(last));
    float before[2][states];
    load(checkpoints[first + last], s);
    load(checkpoints[first + ::max(last - 1, 0)], before);
    __syncthreads();  // the first stages are prepared
    for (int stage = 0; stage < chunks.stages(last); ++stage) scan_stage(0, stage, slots.now(stage));
    for (int chunk = last; chunk >= 0; --chunk) {
      const int turn = chunks.turn(chunk), stages = chunks.stages(chunk);
#pragma unroll
      for (int i = 0; i < 2 * states; ++i) s[i / states][i % states] = before[i / states][i % states];
      load(checkpoints[first + ::max(chunk - 2, 0)], before);  // arrives meanwhile
      for (int stage = stages - 1; stage >= 0; --stage, buffer ^= 1) {
        const int next = stages - 1 - stage;  // of the first chunk's predecessor, whatever is there
        adjoin_stage(turn, stage, slots.now(stage), buffer, next, slots.next(next));
        slots.pass_on(stage);
        __syncthreads();  // the stage can be finished
      }
      slots.next_chunk();
      if (chunk > 0)
        for (int stage = stages; stage < Traits::stages; ++stage) scan_stage(turn + 1, stage, slots.now(stage));
    }
  }
};

}  // namespace zamba::kernel
