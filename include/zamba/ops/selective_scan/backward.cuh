// SPDX-License-Identifier: MIT
// The backward pass of selective_scan on CUDA in float for up to 16 states, by warp-specialised producers and consumers
// as the forward pass in prefill.cuh. With dyp = dy silu(z), and g_t = dL/ds_t,
//
//   g_t  = C_t dyp_t + exp(dt_{t+1} A) g_{t+1}
//   dB_t = sum_channels g_t dt_t u_t                    dC_t = sum_channels dyp_t s_t
//   d dt_t = sum_n g_t (A exp(dt_t A) s_{t-1} + B_t u_t)    dA = sum_t g_t dt_t exp(dt_t A) s_{t-1}
//
// A block takes 32 neighbouring channels of one head through its rows, each from its last chunk to its first. A
// consumer has four states of one channel. From the state that is kept where a chunk begins it computes those where
// each group of four tokens begins; then, from the last group to the first, the group's states and decays once more,
// now into registers, and from these the adjoint state g. So an exp is computed twice, and no state leaves the
// multiprocessor.
//
// Stages of eight tokens lie in shared memory; a chunk is eight of them. One barrier ends a step:
//
//   consumers    states of chunk k     adjoints 7    adjoints 6    ...   adjoints 0    states of chunk k - 1
//   producers    finish 0 of k + 1     -             finish 7      ...   finish 1      finish 0
//
// A producer finishes a stage, adding up what its consumers left of each token and channel, and prepares another in its
// place: stage 0 of the chunk before where stage 7 was, and so on. So the stages of every second chunk lie in reverse.
//
// The order of sums. Over n: four neighbouring ones in order, then these by pairs. dB and dC: four channels by tensor
// cores, the eight such parts of a block in order, then the blocks of a head. Parameters: tokens from last to first,
// those at the same place of stages together, rows of a group in order, then groups.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/quad_sums.cuh>
#include <zamba/ops/selective_scan/step.cuh>

namespace zamba::kernel {

/// What the backward pass leaves for sums over blocks.
template <class F>
struct ScanPartials {
  Tensor<F, 3> BC;          // (tiles, tokens, 2 N): each tile's share of dB, then of dC
  Tensor<F, 3> parameters;  // (groups of rows, D, N + 2): dA, then dD, then d delta_bias
};

/// A backward scan in float. Wide_: all rows of activations begin at multiples of four elements, and heads and states
/// come in fours.
template <class A_, bool Wide_>
struct ScanBackwardTraits {
  using A = A_;
  static constexpr bool wide = Wide_;
  static constexpr bool exact = sizeof(A) > 2;  // whether dB and dC are summed with all bits of a float
  static constexpr int slices = 4, states = 4, most_states = slices * states;
  static constexpr int channels = 32, quads = channels / 4;              // of a block; four channels are a quad
  static constexpr int consumers = channels * slices;                    // threads; half as many produce
  static constexpr int threads = consumers + consumers / 2, blocks = 2;  // of a multiprocessor, at least
  static constexpr int tokens = (threads - consumers) / quads;           // of a stage: a quad of a token a producer
  static constexpr int group = 4, groups = tokens / group;  // of a stage: tokens of which a consumer has all states
  static constexpr int chunk = static_cast<int>(scan_chunk), stages = chunk / tokens;
  static constexpr int parts = quads;  // of dB and dC
  static_assert(scan_chunk % tokens == 0 && tokens % group == 0, "zamba: chunks are stages, and stages groups");
};

/// What producers and consumers of a backward scan hand to each other.
template <class Traits>
struct ScanBackwardShared {
  static constexpr int tokens = Traits::tokens, channels = Traits::channels, slices = Traits::slices;
  static constexpr int values = 2 * Traits::most_states;  // of a token: B and C

  float4 steps[Traits::chunk][channels];  // place(), step_place(): dt, dt u, dyp, d dt / d delta
  alignas(16) float BC[Traits::chunk][slices][2][Traits::states];   // of each slice B, then C
  float4 starts[Traits::chunk / Traits::group][Traits::consumers];  // a consumer's states where groups begin
  // Of two stages in turn, called buffers:
  float sums[2][tokens][slices * channels];            // sum_place(): sum of C s
  float2 adjoints[2][tokens][slices * channels];       // sum_place(): sums of g B, and of g A log2(e) exp(dt A) s
  float4 parts[2][tokens][Traits::parts][values / 4];  // part_place(): of dB, then of dC

  /// Where the first token of a stage is. Chunks take turns; in every second one stages are in reverse.
  __device__ static int place(int turn, int stage) { return (turn % 2 ? Traits::stages - 1 - stage : stage) * tokens; }
  /// So that lanes meet different banks, quads of channels are in another order in every eight of them, slices are
  /// turned against each other, and so are parts and tokens.
  __device__ static int step_place(int channel) { return channel ^ channel / 8 % 4; }
  __device__ static int sum_place(int channel, int slice) {
    return slice * channels + (channel + slice * (channels / slices)) % channels;
  }
  __device__ static int part_place(int quad, int part, int token) { return quad ^ part % 2 ^ token % 2 * 2; }
};

/// How the chunks of a row are walked through.
template <class Traits>
struct ScanChunks {
  int length, count;
  __device__ explicit ScanChunks(Index length)
      : length(static_cast<int>(length)), count(ceil_div(this->length, Traits::chunk)) {}
  __device__ int turn(int chunk) const { return count - 1 - chunk; }
  __device__ int stages(int chunk) const {
    return ceil_div(::min(length - chunk * Traits::chunk, Traits::chunk), Traits::tokens);
  }
};

/// A consumer: a slice of the states of one channel. Warp w, lane l:
///   channel of the tile   8 w + 4 (l / 4 % 2) + l % 4          (four neighbouring lanes are one part of dB and dC)
///   slice                 l / 8
template <class Traits>
struct ScanBackwardConsumer {
  static constexpr int states = Traits::states, group = Traits::group;
  using Shared = ScanBackwardShared<Traits>;

  Shared& shared;
  int slice, first_state, mine;  // mine: states that there are
  int step_place, sum_place;     // of the channel, and of its slice
  Index channel;
  float a[states], d_a[states] = {};  // the decay's exponent, and the gradient of A
  float s[states], g[states];         // the state and its adjoint

  __device__ ScanBackwardConsumer(Shared& shared, const SelectiveScanInputs<typename Traits::A, float>& in,
                                  const ScanTile& tile)
      : shared(shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, of_tile = 8 * warp + lane % 8;
    slice = lane / 8;
    step_place = Shared::step_place(of_tile);
    sum_place = Shared::sum_place(of_tile, slice);
    first_state = slice * states;
    mine = of_tile < tile.width ? ::min(::max(static_cast<int>(in.B.shape[2]) - first_state, 0), states) : 0;
    channel = tile.channel + of_tile;
#pragma unroll
    for (int n = 0; n < states; ++n) a[n] = n < mine ? scan_decay(in.A_log(channel, first_state + n)) : 0.0f;
  }

  template <class F>
  __device__ void load(const Matrix<F>& from, float (&to)[states]) const {
#pragma unroll
    for (int n = 0; n < states; ++n) to[n] = n < mine ? from(first_state + n, channel) : 0.0f;
  }

  __device__ float decay(float dt, int n) const { return exp2_approximate(dt * a[n]); }

  /// Scans so many groups, and keeps the states where they begin.
  template <int Groups>
  __device__ void scan(int index, int place) {
    float step[Groups * group][2], B[Groups * group][states];
#pragma unroll
    for (int k = 0; k < Groups * group; ++k) {
      load_vector<2>(&shared.steps[place + k][step_place].x).unpack(step[k]);
      load_vector<4>(shared.BC[place + k][slice][0]).unpack(B[k]);
    }
#pragma unroll
    for (int k = 0; k < Groups * group; ++k) {
      if (k % group == 0) store_vector(&shared.starts[index + k / group][threadIdx.x].x, s);
#pragma unroll
      for (int n = 0; n < states; ++n) s[n] = ::fmaf(decay(step[k][0], n), s[n], step[k][1] * B[k][n]);
    }
  }

  /// What is known of a group: of token k the operands, its decays, and states[k] before it.
  struct Group {
    float step[group][4], B[group][states], C[group][states];
    float decays[group][states], states_at[group + 1][states];
  };

  /// The states of a group once more, and the sums of C s; `token` of the stage is its first.
  __device__ void scan_again(Group& at, int index, int place, int buffer, int token) {
    load_vector<4>(&shared.starts[index][threadIdx.x].x).unpack(at.states_at[0]);
#pragma unroll
    for (int k = 0; k < group; ++k) {
      load_vector<4>(&shared.steps[place + k][step_place].x).unpack(at.step[k]);
      load_vector<4>(shared.BC[place + k][slice][0]).unpack(at.B[k]);
      load_vector<4>(shared.BC[place + k][slice][1]).unpack(at.C[k]);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < states; ++n) {
        at.decays[k][n] = decay(at.step[k][0], n);
        at.states_at[k + 1][n] = ::fmaf(at.decays[k][n], at.states_at[k][n], at.step[k][1] * at.B[k][n]);
        sum = ::fmaf(at.states_at[k + 1][n], at.C[k][n], sum);
      }
      shared.sums[buffer][token + k][sum_place] = sum;
    }
  }

  /// The adjoint state from the end of a group to its beginning, and what comes of it.
  __device__ void adjoin(const Group& at, int buffer, int token) {
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32 * 2 + lane / 4 % 2;
    QuadSums<Traits::exact> parts;  // of tokens k and k - 1, k odd
#pragma unroll
    for (int k = group - 1; k >= 0; --k) {
      const float dt = at.step[k][0], dt_u = at.step[k][1], dyp = at.step[k][2];
      float d_B[states], d_C[states], g_B = 0, d_dt = 0;
#pragma unroll
      for (int n = 0; n < states; ++n) {
        g[n] = ::fmaf(dyp, at.C[k][n], g[n]);
        d_B[n] = g[n] * dt_u;
        d_C[n] = dyp * at.states_at[k + 1][n];
        g_B = ::fmaf(g[n], at.B[k][n], g_B);
        g[n] *= at.decays[k][n];
        const float through_decay = g[n] * at.states_at[k][n];
        d_dt = ::fmaf(through_decay, a[n], d_dt);
        d_a[n] = ::fmaf(through_decay, dt, d_a[n]);
      }
      shared.adjoints[buffer][token + k][sum_place] = make_float2(g_B, d_dt);
      parts.add(k % 2 * 2, d_B);
      parts.add(k % 2 * 2 + 1, d_C);
      if (k % 2 > 0) continue;
      const int mine = lane % 4, of_token = token + k + mine / 2, quad = mine % 2 * Traits::slices + slice;
      shared.parts[buffer][of_token][part][Shared::part_place(quad, part, of_token)] = parts.take();
    }
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
    __syncthreads();  // the first stages are prepared
    for (int chunk = chunks.count - 1; chunk >= 0; --chunk) {
      const int turn = chunks.turn(chunk), last = chunks.stages(chunk) - 1;
      load(checkpoints[first + chunk], s);
      for (int stage = 0; stage < last; ++stage)
        scan<Traits::groups>(stage * Traits::groups, Shared::place(turn, stage));
      __syncthreads();  // the last stage is prepared, that of the chunk before finished
      scan<Traits::groups - 1>(last * Traits::groups, Shared::place(turn, last));
      store_vector(&shared.starts[last * Traits::groups + Traits::groups - 1][threadIdx.x].x, s);
      for (int stage = last; stage >= 0; --stage, buffer ^= 1) {
        adjoin_stage(stage, Shared::place(turn, stage), buffer);
        __syncthreads();  // the stage can be finished
      }
    }
  }
};

/// A place that moves with the token, by one multiplication of 32 bits.
template <class T>
struct TokenPlace {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  Byte* first = nullptr;
  int step = 0;
  TokenPlace() = default;
  __device__ TokenPlace(T* first, Index stride)
      : first(reinterpret_cast<Byte*>(first)), step(static_cast<int>(stride * Index{sizeof(T)})) {}
  __device__ T* operator()(int token) const {
    Index offset;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(token), "r"(step));
    return reinterpret_cast<T*>(first + offset);
  }
};

/// A producer. Of every stage, thread i takes token i / 8, and of it channels 4 (i % 8) .. and four elements of B or C.
template <class Traits>
struct ScanBackwardProducer {
  using A = typename Traits::A;
  using Quad = AlignedVector<A, 4>;
  using Shared = ScanBackwardShared<Traits>;
  using Inputs = SelectiveScanInputs<A, float>;
  using Gradients = SelectiveScanGradients<A, float>;
  static constexpr bool wide = Traits::wide;
  static constexpr int slices = Traits::slices, tokens = Traits::tokens;

  Shared& shared;
  int token, quad, width;        // width: channels of the quad that there are
  int of_C, BC_slice, BC_width;  // whether of C, the slice, states that there are
  float bias[4], skip[4];        // of the channels
  float d_bias[4] = {}, d_skip[4] = {};
  // Of the row's tokens, `token` further on.
  TokenPlace<const A> u, delta, z, d_y, BC;
  TokenPlace<A> d_u, d_delta, d_z;
  TokenPlace<float> part;

  __device__ ScanBackwardProducer(Shared& shared, const Inputs& in, const ScanTile& tile) : shared(shared) {
    const int thread = static_cast<int>(threadIdx.x) - Traits::consumers;
    token = thread / Traits::quads;
    quad = thread % Traits::quads;
    width = ::max(::min(tile.width - 4 * quad, 4), 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = i < width ? in.delta_bias[tile.channel + 4 * quad + i] : 0.0f;
      skip[i] = i < width ? in.D[tile.channel + 4 * quad + i] : 0.0f;
    }
    of_C = quad / slices;
    BC_slice = quad % slices;
    BC_width = ::max(::min(static_cast<int>(in.B.shape[2]) - 4 * BC_slice, 4), 0);
  }

  /// A row whose first token is `begin`; part_BC: of the tile.
  __device__ void begin_row(const Inputs& in, const Matrix<const A>& dy, const Gradients& out,
                            const Matrix<float>& part_BC, const ScanTile& tile, Index begin) {
    const Index channel = tile.channel + 4 * quad, first = begin + token;
    const auto of = [&](const auto& matrix) { return TokenPlace(&matrix(first, channel), matrix.stride[0]); };
    u = of(in.u), delta = of(in.delta), z = of(in.z), d_y = of(dy);
    d_u = of(out.u), d_delta = of(out.delta), d_z = of(out.z);
    const Tensor<const A, 3>& source = of_C ? in.C : in.B;
    BC = TokenPlace(&source(first, tile.head, 4 * BC_slice), source.stride[0]);
    part = TokenPlace(&part_BC(first, of_C * in.B.shape[2] + 4 * BC_slice), part_BC.stride[0]);
  }

  /// Elements of a stage; its first token is `first` of the row, which has `left` tokens from there on, here and below.
  struct Loaded {
    Quad u, delta, z, d_y, BC;
  };
  __device__ Loaded load(int first, int left) const {
    const int there = token < left ? width : 0;
    return {load_vector_masked<4, wide>(u(first), there), load_vector_masked<4, wide>(delta(first), there),
            load_vector_masked<4, wide>(z(first), there), load_vector_masked<4, wide>(d_y(first), there),
            load_vector_masked<4, wide>(BC(first), token < left ? BC_width : 0)};
  }
  /// Those that a stage is finished with.
  struct Kept {
    Quad u, z, d_y;
  };
  __device__ Kept load_kept(int first, int left) const {
    const int there = token < left ? width : 0;
    return {load_vector_masked<4, wide>(u(first), there), load_vector_masked<4, wide>(z(first), there),
            load_vector_masked<4, wide>(d_y(first), there)};
  }

  /// Writes what consumers read of a stage.
  __device__ void prepare(int place, int left, const Loaded& loaded) const {
    constexpr float none = -1e30f;  // past the end dt is 0 with it, and the state stays as it is
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = token < left ? loaded.delta[i] + bias[i] : none, dt = scan_softplus(x);
      shared.steps[place + token][Shared::step_place(4 * quad + i)] =
          make_float4(dt, dt * loaded.u[i], loaded.d_y[i] * silu(loaded.z[i]), scan_sigmoid(x));
    }
    float values[4];
    loaded.BC.unpack(values);
    store_vector(shared.BC[place + token][BC_slice][of_C], values);
  }

  /// Writes the gradients of a stage: of its tokens and channels, and the block's part of dB and dC.
  __device__ void finish(int first, int place, int left, int buffer, const Kept& kept) {
    float sums[slices][4], adjoints[slices][8];
#pragma unroll
    for (int k = 0; k < slices; ++k) {
      const int at = Shared::sum_place(4 * quad, k);
      load_vector<4>(&shared.sums[buffer][token][at]).unpack(sums[k]);
      load_vector<8>(&shared.adjoints[buffer][token][at].x).unpack(adjoints[k]);
    }
    float of_u[4], of_delta[4], of_z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr float ln_2 = 0.693147181f;
      const auto sum_of = [&](int j) { return (adjoints[0][j] + adjoints[1][j]) + (adjoints[2][j] + adjoints[3][j]); };
      const float4 step = shared.steps[place + token][Shared::step_place(4 * quad + i)];
      const float u = kept.u[i], z = kept.z[i], gate = scan_sigmoid(z), g_B = sum_of(2 * i);
      const float y = ::fmaf(skip[i], u, (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
      of_u[i] = ::fmaf(g_B, step.x, step.z * skip[i]);
      of_delta[i] = ::fmaf(sum_of(2 * i + 1), ln_2, g_B * u) * step.w;
      of_z[i] = kept.d_y[i] * y * gate * ::fmaf(z, 1.0f - gate, 1.0f);
      d_skip[i] = ::fmaf(step.z, u, d_skip[i]);
      d_bias[i] += of_delta[i];
    }
    const int there = token < left ? width : 0;
    store_vector_masked<wide>(d_u(first), of_u, there);
    store_vector_masked<wide>(d_delta(first), of_delta, there);
    store_vector_masked<wide>(d_z(first), of_z, there);
    float sum[4];
#pragma unroll
    for (int k = 0; k < Traits::parts; ++k) {
      float one[4];
      load_vector<4>(&shared.parts[buffer][token][k][Shared::part_place(quad, k, token)].x).unpack(one);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = k > 0 ? sum[i] + one[i] : one[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] *= QuadSums<Traits::exact>::scale;
    store_vector_masked<wide>(part(first), sum, token < left ? BC_width : 0);
  }

  /// The way through a row, as the consumers'.
  __device__ void through_row(const ScanChunks<Traits>& chunks, int& buffer) {
    const int length = chunks.length;
    int chunk = chunks.count - 1, stage = 0;  // the next to be prepared
    int ahead = chunk * Traits::chunk;        // its first token
    Loaded loaded = load(ahead, length - ahead);
    const auto prepare_next = [&](int place) {
      if (chunk < 0) return;
      prepare(place, length - ahead, loaded);
      ahead += tokens;
      if (++stage == chunks.stages(chunk)) stage = 0, --chunk, ahead = chunk * Traits::chunk;
      if (chunk >= 0) loaded = load(ahead, length - ahead);
    };
    for (int i = 0; i < Traits::stages; ++i) prepare_next(Shared::place(chunks.turn(chunk), stage));

    int behind = (chunks.length - 1) / tokens * tokens;  // the first token of the next to be finished
    Kept kept = load_kept(behind, length - behind);
    const auto finish_next = [&](int place) {
      finish(behind, place, length - behind, buffer, kept);
      behind -= tokens;
      buffer ^= 1;
      if (behind >= 0) kept = load_kept(behind, length - behind);
      prepare_next(place);
    };
    __syncthreads();  // the first stages are prepared
    for (int k = chunks.count - 1; k >= 0; --k) {
      if (k < chunks.count - 1) finish_next(Shared::place(chunks.turn(k + 1), 0));
      __syncthreads();  // the last stage is prepared, that of the chunk before finished
      __syncthreads();  // the last stage can be finished
      for (int i = chunks.stages(k) - 1; i > 0; --i) {
        finish_next(Shared::place(chunks.turn(k), i));
        __syncthreads();  // the stage before it can be finished
      }
    }
    finish_next(Shared::place(chunks.turn(0), 0));
  }
};

/// dD and d delta_bias of a block, of producers with the same channels: in the order of their tokens.
template <class Traits>
__device__ void sum_producers(float (*memory)[Traits::tokens][Traits::channels],
                              const ScanBackwardProducer<Traits>* producer, const ScanTile& tile, Index N,
                              const Matrix<float>& to) {
  if (producer)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      memory[0][producer->token][4 * producer->quad + i] = producer->d_skip[i];
      memory[1][producer->token][4 * producer->quad + i] = producer->d_bias[i];
    }
  __syncthreads();
  const int channel = threadIdx.x % Traits::channels, which = threadIdx.x / Traits::channels;
  if (which > 1 || channel >= tile.width) return;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < Traits::tokens; ++k) sum += memory[which][k][channel];
  to(tile.channel + channel, N + which) = sum;
}

/// Rows blockIdx.x / tiles * rows_each and on, of a tile of channels.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_backward_kernel(SelectiveScanInputs<typename Traits::A, float> in,
                                   Matrix<const typename Traits::A> d_y, Sequences sequences,
                                   Tensor<const float, 3> checkpoints,
                                   SelectiveScanGradients<typename Traits::A, float> out, Tensor<float, 3> d_state,
                                   ScanPartials<float> partials, Index rows_each) {
  extern __shared__ float4 scan_backward_memory[];
  auto& shared = *reinterpret_cast<ScanBackwardShared<Traits>*>(scan_backward_memory);
  auto* sums = reinterpret_cast<float(*)[Traits::tokens][Traits::channels]>(shared.starts);  // free at the end
  launch_dependents();
  grid_dependency_wait();
  const ScanTile tile = scan_tile(in, Traits::channels);
  const Index N = in.B.shape[2], first_row = tile.row * rows_each;
  const Index end_row = ::min(first_row + rows_each, sequences.rows);
  const Matrix<float> parameters = partials.parameters[tile.row];
  int buffer = 0;
  if (threadIdx.x < Traits::consumers) {
    ScanBackwardConsumer<Traits> consumer(shared, in, tile);
    for (Index row = first_row; row < end_row; ++row) {
      const ScanChunks<Traits> chunks(sequences.length(row));
      if (chunks.length == 0) continue;
#pragma unroll
      for (int n = 0; n < Traits::states; ++n) consumer.g[n] = 0;
      if (d_state) consumer.load(d_state[row], consumer.g);
      consumer.through_row(chunks, checkpoints, sequences.begin(row) / scan_chunk + row, buffer);
      const bool continued = sequences.start(row) > 0;  // otherwise no initial state has a gradient
#pragma unroll
      for (int n = 0; n < Traits::states; ++n)
        if (d_state && n < consumer.mine)
          d_state(row, consumer.first_state + n, consumer.channel) = continued ? consumer.g[n] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < Traits::states; ++n)
      if (n < consumer.mine) parameters(consumer.channel, consumer.first_state + n) = consumer.d_a[n];
    sum_producers<Traits>(sums, nullptr, tile, N, parameters);
  } else {
    ScanBackwardProducer<Traits> producer(shared, in, tile);
    const auto tiles = static_cast<unsigned>(partials.BC.shape[0]);
    for (Index row = first_row; row < end_row; ++row) {
      const ScanChunks<Traits> chunks(sequences.length(row));
      if (chunks.length == 0) continue;
      producer.begin_row(in, d_y, out, partials.BC[blockIdx.x % tiles], tile, sequences.begin(row));
      producer.through_row(chunks, buffer);
    }
    sum_producers<Traits>(sums, &producer, tile, N, parameters);
  }
}

}  // namespace zamba::kernel
