// SPDX-License-Identifier: MIT
// selective_scan on CUDA in float for rows of more than one token and up to 32 states: a sequential scan with the state
// in registers, by warp-specialised producers and consumers. Equations in selective_scan.hpp.
//
// What bounds the scan is one exp a token, channel and state, of which a multiprocessor does 16 a clock. Chunks of a
// row in parallel would need each of them twice, so a row is one sequence of steps here, and parallelism comes from the
// states: a thread has 4 or 8 states of one channel, and many of their exps under way, as none depends on the state
// before it.
//
// A block takes 32 neighbouring channels of one head through a row, in stages of 16 tokens. Half of its warps consume:
// they scan. The others produce what those read, and finish what they leave:
//
//   stage        i - 1                  i        i + 1                           i + 2, i + 3
//   producers    finish: sums to y               prepare: dt, dt u, B, C         load, into a ring of registers
//   consumers                           scan
//
//   - Stages lie in shared memory twice (double buffering), so one barrier a stage is enough, and a consumer never
//   waits
//     for global memory.
//   - A consumer warp scans two slices of 16 channels: neighbouring lanes read neighbouring steps, and B and C of a
//     slice are read by 16 lanes at once. What registers receive from shared memory is the second bound.
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
  static constexpr int channels = 32, quads = channels / 4;  // of a block; four channels are a quad
  static constexpr int consumers = channels * slices;        // threads; as many produce
  static constexpr int threads = 2 * consumers, blocks = 2;  // of a multiprocessor, at least
  static constexpr int tokens = consumers / quads;           // of a stage: a quad of a token a producer
  static constexpr int group = 16 / states;  // tokens whose operands are read while those before are scanned
  // Stages between a load and its use, as far as registers allow; and a slot each for those of prepare, scan, finish.
  static constexpr int ahead = states > 4 || sizeof(A) > 2 ? 1 : 2, ring = 3 + ahead;
  // Quads of B and C: all of a token's are one a producer, for so many tokens at once.
  static constexpr int state_quads = slices * states / 4, quad_tokens = consumers / (2 * state_quads);
  static constexpr int quad_loads = tokens / quad_tokens;
  static_assert(scan_chunk % tokens == 0, "zamba: states are kept at multiples of the tokens of a stage");
  static_assert(tokens % quad_tokens == 0, "zamba: threads share tokens evenly");
};

/// What producers and consumers hand to each other in shared memory: two stages in turn, called buffers.
template <class Traits>
struct ScanStages {
  /// Halves of the channels, 16 each, in different banks.
  static constexpr int half = Traits::channels / 2, step_line = 2 * Traits::channels + 4;
  static constexpr int sum_half = half * Traits::slices + half, sum_line = 2 * sum_half;

  // (buffer, token, ...)
  alignas(16) float steps[2][Traits::tokens][step_line];                       // step_place(channel): dt, dt u
  alignas(16) float BC[2][Traits::tokens][Traits::slices][2][Traits::states];  // of each slice B, then C
  alignas(16) float sums[2][Traits::tokens][sum_line];                         // sum_place(channel, slice): sum of C s

  __device__ static int step_place(int channel) { return 2 * channel + channel / half * 4; }
  __device__ static int sum_place(int channel, int slice) {
    return channel / half * sum_half + slice * half + channel % half;
  }
};

/// A consumer: a slice of the states of one channel, in registers. Warp w, lane l:
///   channel of the tile   16 (w / 2) + l % 16
///   slice                  2 (w % 2) + l / 16
template <class Traits>
struct ScanConsumer {
  static constexpr int states = Traits::states, group = Traits::group, tokens = Traits::tokens;
  using Stages = ScanStages<Traits>;

  int slice, first_state, mine;  // mine: states that there are
  int step_place, sum_place;     // in a token's line of ScanStages
  Index channel;
  float a[states], s[states];  // the decay's exponent, and the state

  /// The state begins with a row of `state`, or with zero.
  __device__ ScanConsumer(const SelectiveScanInputs<typename Traits::A, float>& in, const ScanTile& tile,
                          const Sequences& sequences, const Tensor<float, 3>& state) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int of_tile = warp / 2 * Stages::half + lane % Stages::half, N = static_cast<int>(in.B.shape[2]);
    slice = warp % 2 * 2 + lane / Stages::half;
    step_place = Stages::step_place(of_tile);
    sum_place = Stages::sum_place(of_tile, slice);
    first_state = slice * states;
    mine = of_tile < tile.width ? ::min(::max(N - first_state, 0), states) : 0;
    channel = tile.channel + of_tile;
    const bool continued = state && sequences.start(tile.row) > 0;
#pragma unroll
    for (int n = 0; n < states; ++n) {
      a[n] = n < mine ? scan_decay(in.A_log(channel, first_state + n)) : 0.0f;
      s[n] = continued && n < mine ? state(tile.row, first_state + n, channel) : 0.0f;
    }
  }

  __device__ void store(const Matrix<float>& to) const {
#pragma unroll
    for (int n = 0; n < states; ++n)
      if (n < mine) to(first_state + n, channel) = s[n];
  }

  /// What the scan of `group` tokens reads.
  struct Operands {
    float step[group][2];                      // token: dt, dt u
    float B[group][states], C[group][states];  // token, state
  };
  __device__ Operands read(const Stages& stages, int buffer, int token) const {
    Operands operands;
#pragma unroll
    for (int k = 0; k < group; ++k) {
      load_vector<2>(&stages.steps[buffer][token + k][step_place]).unpack(operands.step[k]);
      load_vector<states>(stages.BC[buffer][token + k][slice][0]).unpack(operands.B[k]);
      load_vector<states>(stages.BC[buffer][token + k][slice][1]).unpack(operands.C[k]);
    }
    return operands;
  }

  /// Scans a stage; the operands of a group are read while the one before it is scanned.
  __device__ void scan(Stages& stages, int buffer) {
    Operands next = read(stages, buffer, 0);
#pragma unroll
    for (int token = 0; token < tokens; token += group) {
      const Operands now = next;
      if (token + group < tokens) next = read(stages, buffer, token + group);
#pragma unroll
      for (int k = 0; k < group; ++k)
        stages.sums[buffer][token + k][sum_place] =
            scan_step<states>(now.step[k][0], now.step[k][1], now.B[k], now.C[k], a, s);
    }
  }
};

/// The consumers' way through a row.
template <class Traits>
__device__ void scan_consume(const SelectiveScanInputs<typename Traits::A, float>& in, const Sequences& sequences,
                             const ScanTile& tile, ScanStages<Traits>& stages, const Tensor<float, 3>& state,
                             const Tensor<float, 3>& checkpoints) {
  constexpr int chunk = static_cast<int>(scan_chunk);
  const Index row = tile.row, begin = sequences.begin(row);
  const int length = static_cast<int>(sequences.length(row));
  ScanConsumer<Traits> consumer(in, tile, sequences, state);
  __syncthreads();  // the first stage is prepared
  int buffer = 0;
  for (int first = 0; first < length; first += Traits::tokens, buffer ^= 1) {
    if (checkpoints && first % chunk == 0) consumer.store(checkpoints[begin / chunk + row + first / chunk]);
    consumer.scan(stages, buffer);
    __syncthreads();  // this stage is scanned, the next one prepared
  }
  if (state) consumer.store(state[row]);
}

/// What a thread has loaded of several stages, in registers: so only constant indices may be used, and a loop goes once
/// around the ring. Moving what a slot holds would wait for its loads.
template <class Loaded, int Size_>
struct RegisterRing {
  static constexpr int size = Size_;
  Loaded slots[size]{};
  __device__ Loaded& operator[](int i) { return slots[i % size]; }
};

/// A producer. Of every stage, thread i takes
///   u, delta, z, y   token i / 8, channels 4 (i % 8) ..            (eight quads are 32 channels)
///   B or C           tokens i / 2q, i / 2q + 128 / 2q, ..; of 2q quads, q of B and q of C, the one at i % 2q
template <class Traits>
struct ScanProducer {
  using A = typename Traits::A;
  using Quad = AlignedVector<A, 4>;
  using Stages = ScanStages<Traits>;
  static constexpr int tokens = Traits::tokens, states = Traits::states;
  static constexpr bool wide = Traits::wide;

  int token, quad, width;                  // width: channels of the quad that there are
  float bias[4], skip[4];                  // of these channels
  int BC_token, BC_state, BC_width, of_C;  // the first token, the first state, states that there are
  // Where the next stage lies in line, and how much further the one after it.
  const A *u, *delta, *z, *BC;
  A* y;
  int u_step, delta_step, z_step, BC_step, y_step;

  __device__ ScanProducer(const SelectiveScanInputs<A, float>& in, const ScanTile& tile, Index begin,
                          const Matrix<A>& out) {
    const int thread = static_cast<int>(threadIdx.x) - Traits::consumers;
    quad = thread % Traits::quads;
    token = thread / Traits::quads;
    width = ::min(tile.width - 4 * quad, 4);
    const Index channel = tile.channel + 4 * quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = i < width ? in.delta_bias[channel + i] : 0.0f;
      skip[i] = i < width ? in.D[channel + i] : 0.0f;
    }
    const int of_token = thread % (2 * Traits::state_quads);
    BC_token = thread / (2 * Traits::state_quads);
    of_C = of_token / Traits::state_quads;
    BC_state = of_token % Traits::state_quads * 4;
    BC_width = ::min(static_cast<int>(in.B.shape[2]) - BC_state, 4);
    const Tensor<const A, 3>& source = of_C ? in.C : in.B;
    u = &in.u(begin + token, channel);
    delta = &in.delta(begin + token, channel);
    z = &in.z(begin + token, channel);
    BC = &source(begin + BC_token, tile.head, BC_state);
    y = &out(begin + token, channel);
    u_step = static_cast<int>(in.u.stride[0]) * tokens;
    delta_step = static_cast<int>(in.delta.stride[0]) * tokens;
    z_step = static_cast<int>(in.z.stride[0]) * tokens;
    BC_step = static_cast<int>(source.stride[0]) * Traits::quad_tokens;
    y_step = static_cast<int>(out.stride[0]) * tokens;
  }

  struct Loaded {
    Quad u, delta, z, BC[Traits::quad_loads];
  };
  /// Begins to load the next stage in line; the row has `left` tokens from its first one on, here and below.
  __device__ Loaded load(int left) {
    Loaded loaded;
    const int there = token < left ? width : 0;
    loaded.u = load_vector_masked<4, wide>(u, there);
    loaded.delta = load_vector_masked<4, wide>(delta, there);
    loaded.z = load_vector_masked<4, wide>(z, there);
    u += u_step;
    delta += delta_step;
    z += z_step;
#pragma unroll
    for (int k = 0; k < Traits::quad_loads; ++k) {
      loaded.BC[k] = load_vector_masked<4, wide>(BC, BC_token + k * Traits::quad_tokens < left ? BC_width : 0);
      BC += BC_step;
    }
    return loaded;
  }

  /// Writes what the scan of a stage reads.
  __device__ void prepare(Stages& stages, int buffer, int left, const Loaded& loaded) const {
    constexpr float none = -1e30f;  // past the end delta is so small that dt is 0, which costs no branch
    float steps[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float dt = scan_softplus(token < left ? loaded.delta[i] + bias[i] : none);
      steps[2 * i] = dt;
      steps[2 * i + 1] = dt * loaded.u[i];
    }
    store_vector(&stages.steps[buffer][token][Stages::step_place(4 * quad)], steps);
#pragma unroll
    for (int k = 0; k < Traits::quad_loads; ++k) {
      float values[4];
      loaded.BC[k].unpack(values);
      store_vector(&stages.BC[buffer][BC_token + k * Traits::quad_tokens][BC_state / states][of_C][BC_state % states],
                   values);
    }
  }

  /// Writes the outputs of a scanned stage.
  __device__ void finish(const Stages& stages, int buffer, int left, const Loaded& loaded) {
    float sums[Traits::slices][4], out[4];
#pragma unroll
    for (int k = 0; k < Traits::slices; ++k)
      load_vector<4>(&stages.sums[buffer][token][Stages::sum_place(4 * quad, k)]).unpack(sums[k]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] = scan_output((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]), skip[i], loaded.u[i], loaded.z[i]);
    store_vector_masked<wide>(y, out, token < left ? width : 0);
    y += y_step;
  }
};

/// The producers' way through a row: while stage i is scanned, i - 1 is finished, i + 1 prepared, and one further on
/// begins to load.
template <class Traits>
__device__ void scan_produce(const SelectiveScanInputs<typename Traits::A, float>& in, const Sequences& sequences,
                             const ScanTile& tile, ScanStages<Traits>& stages, const Matrix<typename Traits::A>& y) {
  using Producer = ScanProducer<Traits>;
  constexpr int tokens = Traits::tokens, ahead = Traits::ahead;
  const int length = static_cast<int>(sequences.length(tile.row));
  Producer producer(in, tile, sequences.begin(tile.row), y);
  RegisterRing<typename Producer::Loaded, Traits::ring> ring;
#pragma unroll
  for (int k = 0; k <= ahead; ++k) ring[1 + k] = producer.load(length - k * tokens);
  producer.prepare(stages, 0, length, ring[1]);
  __syncthreads();  // the first stage is prepared
  int buffer = 0;
  for (int left = length;;) {  // tokens of the row from stage i on
#pragma unroll
    for (int k = 0; k < ring.size; ++k) {  // slots: k of stage i - 1, k + 1 of stage i, ...
      if (left < length) producer.finish(stages, buffer ^ 1, left + tokens, ring[k]);
      if (left <= 0) return;
      ring[k + 2 + ahead] = producer.load(left - (1 + ahead) * tokens);
      producer.prepare(stages, buffer ^ 1, left - tokens, ring[k + 2]);
      __syncthreads();  // stage i is scanned, the next one prepared
      left -= tokens;
      buffer ^= 1;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                          Tensor<float, 3> state, Matrix<typename Traits::A> y, Tensor<float, 3> checkpoints) {
  __shared__ ScanStages<Traits> stages;
  launch_dependents();
  grid_dependency_wait();
  const ScanTile tile = scan_tile(in, Traits::channels);
  if (sequences.length(tile.row) == 0) return;
  if (threadIdx.x < Traits::consumers)
    scan_consume<Traits>(in, sequences, tile, stages, state, checkpoints);
  else
    scan_produce<Traits>(in, sequences, tile, stages, y);
}

}  // namespace zamba::kernel
