// SPDX-License-Identifier: MIT
// selective_scan on CUDA in float for rows of more than one token and up to 32 states; equations in selective_scan.hpp.
//
// What bounds the scan is one exp a token, channel and state, of which a multiprocessor does 16 a clock. Chunks of a
// row in parallel would need each of them twice, so a row is one sequence of steps here, and parallelism comes from the
// states: a thread has 4 or 8 states of one channel, and many of their exps under way, as none depends on the state
// before it.
//   - A block takes 32 neighbouring channels of one head through a row, 16 tokens at a time. Half of its warps scan,
//     the others help: they prepare dt, dt u, B and C in shared memory, a group of tokens ahead of the scan, from loads
//     issued one or two groups before, and finish the outputs a group behind it, from the sums of the slices. So a
//     scanning warp meets no load from memory, and a barrier a group is enough, since all of it has two buffers.
//   - A warp scans two slices of 16 channels: neighbouring lanes read neighbouring steps, and B and C of a slice are
//     read by 16 lanes at once. What registers receive from shared memory is the second bound.
//   - Tokens past the end of a row have dt = 0: they change no state, as exp(0) = 1.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/step.cuh>

namespace zamba::kernel {

/// A scan in float of channels whose states are four slices of States_. Wide_: all rows of activations begin at
/// multiples of four elements, and heads and states come in fours.
template <class A_, int States_, bool Wide_>
struct SelectiveScanTraits {
  using A = A_;
  static constexpr int slices = 4, states = States_;
  static constexpr bool wide = Wide_;
  static constexpr int channels = 32, quads = channels / 4;  // of a block
  static constexpr int scanning = channels * slices;         // threads that scan; as many help them
  static constexpr int threads = 2 * scanning, blocks = 2;   // of a multiprocessor, at least
  static constexpr int tokens = scanning / quads;            // between two barriers
  static constexpr int group = 16 / states;  // tokens whose operands are read while those before are scanned
  // Groups of `tokens` between a load and its use, as far as registers allow.
  static constexpr int ahead = states > 4 || sizeof(A) > 2 ? 1 : 2;
  static constexpr int state_quads = slices * states / 4;
  static constexpr int piece_tokens = scanning / (2 * state_quads);  // of which all pieces of B and C are one a thread
  static constexpr int pieces = tokens / piece_tokens;
  static_assert(scan_chunk % tokens == 0, "zamba: states are kept at multiples of the tokens between two barriers");
  static_assert(tokens % piece_tokens == 0, "zamba: threads share tokens evenly");
};

/// What the two halves of a block hand to each other: two groups of tokens in turn.
template <class Traits>
struct ScanShared {
  /// Halves of the channels, 16 each, in different banks.
  static constexpr int half = Traits::channels / 2, step_line = 2 * Traits::channels + 4;
  static constexpr int sum_half = half * Traits::slices + half, sum_line = 2 * sum_half;

  alignas(16) float steps[2][Traits::tokens][step_line];  // dt and dt u
  alignas(16) float BC[2][Traits::tokens][Traits::slices][2][Traits::states];
  alignas(16) float sums[2][Traits::tokens][sum_line];  // C s of each slice

  __device__ static int step_place(int channel) { return 2 * channel + channel / half * 4; }
  __device__ static int sum_place(int channel, int slice) {
    return channel / half * sum_half + slice * half + channel % half;
  }
};

/// Goes through a row with a slice of a channel's states.
template <class Traits>
__device__ void scan_slices(const SelectiveScanInputs<typename Traits::A, float>& in, const Sequences& sequences,
                            const ScanTile& tile, ScanShared<Traits>& shared, const Tensor<float, 3>& state,
                            const Tensor<float, 3>& checkpoints) {
  constexpr int tokens = Traits::tokens, states = Traits::states, group = Traits::group;
  constexpr int half = ScanShared<Traits>::half;
  const Index row = tile.row, begin = sequences.begin(row);
  const int length = static_cast<int>(sequences.length(row)), N = static_cast<int>(in.B.shape[2]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = warp / 2 * half + lane % half, slice = warp % 2 * 2 + lane / half;
  const Index c = tile.channel + channel;
  const int mine = channel < tile.width ? ::min(::max(N - slice * states, 0), states) : 0;  // states there are
  const bool continued = state && sequences.start(row) > 0;
  float a[states], s[states];
#pragma unroll
  for (int n = 0; n < states; ++n) {
    a[n] = n < mine ? scan_decay(in.A_log(c, slice * states + n)) : 0.0f;
    s[n] = continued && n < mine ? state(row, slice * states + n, c) : 0.0f;
  }
  const auto keep = [&](const Matrix<float>& to) {
#pragma unroll
    for (int n = 0; n < states; ++n)
      if (n < mine) to(slice * states + n, c) = s[n];
  };
  // What the scan of `group` tokens reads.
  struct Operands {
    float2 steps[group];
    float B[group][states], C[group][states];
  };
  const int step_place = ScanShared<Traits>::step_place(channel),
            sum_place = ScanShared<Traits>::sum_place(channel, slice);
  const auto operands = [&](int buffer, int t) {
    Operands read;
#pragma unroll
    for (int k = 0; k < group; ++k) {
      read.steps[k] = *reinterpret_cast<const float2*>(&shared.steps[buffer][t + k][step_place]);
#pragma unroll
      for (int n = 0; n < states; n += 4) {
        const float4 b = *reinterpret_cast<const float4*>(&shared.BC[buffer][t + k][slice][0][n]);
        const float4 c = *reinterpret_cast<const float4*>(&shared.BC[buffer][t + k][slice][1][n]);
        read.B[k][n] = b.x, read.B[k][n + 1] = b.y, read.B[k][n + 2] = b.z, read.B[k][n + 3] = b.w;
        read.C[k][n] = c.x, read.C[k][n + 1] = c.y, read.C[k][n + 2] = c.z, read.C[k][n + 3] = c.w;
      }
    }
    return read;
  };
  __syncthreads();
  int buffer = 0;
  for (int first = 0; first < length; first += tokens, buffer ^= 1) {
    if (checkpoints && first % static_cast<int>(scan_chunk) == 0)
      keep(checkpoints[begin / scan_chunk + row + first / static_cast<int>(scan_chunk)]);
    Operands coming = operands(buffer, 0);
#pragma unroll
    for (int t = 0; t < tokens; t += group) {
      const Operands now = coming;
      if (t + group < tokens) coming = operands(buffer, t + group);
#pragma unroll
      for (int k = 0; k < group; ++k)
        shared.sums[buffer][t + k][sum_place] =
            scan_step<states>(now.steps[k].x, now.steps[k].y, now.B[k], now.C[k], a, s);
    }
    __syncthreads();
  }
  if (state) keep(state[row]);
}

/// Prepares what scan_slices() reads, a group of tokens ahead, and finishes the outputs a group behind.
template <class Traits>
__device__ void scan_help(const SelectiveScanInputs<typename Traits::A, float>& in, const Sequences& sequences,
                          const ScanTile& tile, ScanShared<Traits>& shared, const Matrix<typename Traits::A>& y) {
  using A = typename Traits::A;
  using Four = AlignedVector<A, 4>;
  constexpr int tokens = Traits::tokens, slices = Traits::slices, states = Traits::states;
  constexpr bool wide = Traits::wide;
  const Index begin = sequences.begin(tile.row);
  const int length = static_cast<int>(sequences.length(tile.row)), N = static_cast<int>(in.B.shape[2]);
  // Four channels of one of the tokens; and fours of B or of C.
  const int thread = threadIdx.x - Traits::scanning, quad = thread % Traits::quads, token = thread / Traits::quads;
  const int quad_width = ::min(tile.width - 4 * quad, 4);
  const Index quad_channel = tile.channel + 4 * quad;
  float bias[4], skip[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bias[i] = i < quad_width ? in.delta_bias[quad_channel + i] : 0.0f;
    skip[i] = i < quad_width ? in.D[quad_channel + i] : 0.0f;
  }
  constexpr int state_quads = Traits::state_quads, piece_tokens = Traits::piece_tokens;
  const int piece = thread % (2 * state_quads), piece_token = thread / (2 * state_quads);
  const int of_C = piece / state_quads, piece_state = piece % state_quads * 4;
  const int piece_width = ::min(N - piece_state, 4);
  const Tensor<const A, 3>& source = of_C ? in.C : in.B;

  const A* u_at = &in.u(begin + token, quad_channel);
  const A* delta_at = &in.delta(begin + token, quad_channel);
  const A* z_at = &in.z(begin + token, quad_channel);
  const A* piece_at = &source(begin + piece_token, tile.head, piece_state);
  A* y_at = &y(begin + token, quad_channel);
  const int u_step = static_cast<int>(in.u.stride[0]) * tokens, z_step = static_cast<int>(in.z.stride[0]) * tokens;
  const int delta_step = static_cast<int>(in.delta.stride[0]) * tokens;
  const int piece_step = static_cast<int>(source.stride[0]) * piece_tokens;
  const int y_step = static_cast<int>(y.stride[0]) * tokens;

  struct Loaded {
    Four u, delta, z, pieces[Traits::pieces];
  };
  // The next tokens in line, of which the row has `left`.
  const auto load = [&](int left) {
    Loaded loaded;
    const int width = token < left ? quad_width : 0;
    loaded.u = load_vector_masked<4, wide>(u_at, width);
    loaded.delta = load_vector_masked<4, wide>(delta_at, width);
    loaded.z = load_vector_masked<4, wide>(z_at, width);
    u_at += u_step;
    delta_at += delta_step;
    z_at += z_step;
#pragma unroll
    for (int k = 0; k < Traits::pieces; ++k) {
      loaded.pieces[k] = load_vector_masked<4, wide>(piece_at, piece_token + k * piece_tokens < left ? piece_width : 0);
      piece_at += piece_step;
    }
    return loaded;
  };
  // Past the end delta is so small that dt is 0, which costs no branch.
  constexpr float none = -1e30f;
  const auto prepare = [&](int buffer, int left, const Loaded& loaded) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float dt = scan_softplus(token < left ? loaded.delta[i] + bias[i] : none);
      values[2 * i] = dt;
      values[2 * i + 1] = dt * loaded.u[i];
    }
    float* const to = &shared.steps[buffer][token][ScanShared<Traits>::step_place(4 * quad)];
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(values[4], values[5], values[6], values[7]);
#pragma unroll
    for (int k = 0; k < Traits::pieces; ++k) {
      const Four& four = loaded.pieces[k];
      *reinterpret_cast<float4*>(
          &shared.BC[buffer][piece_token + k * piece_tokens][piece_state / states][of_C][piece_state % states]) =
          make_float4(four[0], four[1], four[2], four[3]);
    }
  };
  // The outputs of four channels, from the sums of the slices.
  const auto finish = [&](int buffer, const Loaded& loaded, int width) {
    float parts[slices][4], out[4];
#pragma unroll
    for (int k = 0; k < slices; ++k) {
      const float4 part =
          *reinterpret_cast<const float4*>(&shared.sums[buffer][token][ScanShared<Traits>::sum_place(4 * quad, k)]);
      parts[k][0] = part.x, parts[k][1] = part.y, parts[k][2] = part.z, parts[k][3] = part.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] =
          scan_output((parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]), skip[i], loaded.u[i], loaded.z[i]);
    store_vector_masked<wide>(y_at, out, width);
    y_at += y_step;
  };

  // A ring of groups of tokens: one to be finished, one that is scanned, one to be prepared, those on their way. The
  // loop goes once around it, as moving a group would wait for its loads.
  constexpr int ahead = Traits::ahead, ring = 3 + ahead;
  Loaded line[ring]{};
#pragma unroll
  for (int k = 0; k <= ahead; ++k) line[1 + k] = load(length - k * tokens);
  prepare(0, length, line[1]);
  __syncthreads();
  int buffer = 0;
  for (int left = length;;) {
#pragma unroll
    for (int k = 0; k < ring; ++k) {
      if (left < length) finish(buffer ^ 1, line[k], token < left + tokens ? quad_width : 0);
      if (left <= 0) return;
      line[(k + 2 + ahead) % ring] = load(left - (1 + ahead) * tokens);
      prepare(buffer ^ 1, left - tokens, line[(k + 2) % ring]);
      __syncthreads();
      left -= tokens;
      buffer ^= 1;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                          Tensor<float, 3> state, Matrix<typename Traits::A> y, Tensor<float, 3> checkpoints) {
  __shared__ ScanShared<Traits> shared;
  launch_dependents();
  grid_dependency_wait();
  const ScanTile tile = scan_tile(in, Traits::channels);
  if (sequences.length(tile.row) == 0) return;
  if (threadIdx.x < Traits::scanning)
    scan_slices<Traits>(in, sequences, tile, shared, state, checkpoints);
  else
    scan_help<Traits>(in, sequences, tile, shared, y);
}

}  // namespace zamba::kernel
