// SPDX-License-Identifier: MIT
// selective_scan on CUDA, forward; equations and shapes in selective_scan.hpp.
//
// What bounds a scan in float is one exp a token, channel and state, of which a multiprocessor does 16 a clock. Chunks
// of a row in parallel would need each of them twice, so a row is one sequence of steps here, and parallelism comes
// from the states: the slices of a channel's states belong to different warps, 4 or more states of one channel to a
// thread. An exp does not depend on the state before it, so a thread has many of them under way.
//   - A block takes neighbouring channels of one head, lane by lane, and goes through a row some tokens at a time. For
//     each group of tokens its threads prepare dt, dt u, B and C in shared memory, one group ahead of the scan, from
//     loads issued another group ahead; and finish the outputs one group behind, from the sums of the slices. A barrier
//     a group is enough, since all of it has two buffers.
//   - What is prepared and finished is spread over the steps of the scan, whose special-function unit it needs less.
//   - Tokens past the end of a row have dt = 0: they change no state, as exp(0) = 1.
//   - Slices of 4 states give the most warps, slices of 8 need less of shared memory; both sum in the same order, so
//     the number of rows decides. Single tokens go through a kernel of their own, which is bound by the states' memory.
// double and more than 32 states take a thread a channel.
//
// Numeric contract: everything in compute_t. In float an exp is 2^x of the special-function unit, within 2e-7, and dt
// and the gate within (3 + |x|) 1e-7 of theirs for an input x. The sum over n: four neighbouring n in order, then these
// sums by pairs. Nothing depends on how a sequence is cut or on other rows. Agrees with the CPU version to rounding, a
// rerun is bit-equal. Activations stored as bf16 are rounded once, when written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/tensor_core.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/selective_scan.hpp>

namespace zamba {

namespace detail {

/// log(1 + exp(x)) = max(x, 0) + log(1 + w), w = exp(-|x|); log(1 + w) / w by a polynomial, within 2e-7.
__device__ inline float scan_softplus(float x) {
  const float w = exp2_approximate(::fabsf(x) * -log2_e);
  float p = 0.00523269409f;
  p = ::fmaf(p, w, -0.0295052379f);
  p = ::fmaf(p, w, 0.0782259479f);
  p = ::fmaf(p, w, -0.136632457f);
  p = ::fmaf(p, w, 0.191060066f);
  p = ::fmaf(p, w, -0.24842982f);
  p = ::fmaf(p, w, 0.333190978f);
  p = ::fmaf(p, w, -0.499994934f);
  p = ::fmaf(p, w, 0.99999994f);
  return ::fmaf(p, w, x > 0 ? x : 0.0f);
}

/// (sum + skip u) silu(z)
__device__ inline float scan_output(float sum, float skip, float u, float z) {
  return ::fmaf(skip, u, sum) * (z * reciprocal_approximate(1.0f + exp2_approximate(z * -log2_e)));
}

/// -exp(A_log) log2(e): the decay is 2 to the power of dt times it. Finite, so that dt = 0 is no decay.
__device__ inline float scan_decay(float A_log) {
  constexpr float least = -3.4e38f;
  const float a = -::expf(A_log) * log2_e;
  return a < least ? least : a;
}

/// One step of States states, and the sum of C s over them: each four in order, then these by pairs.
template <int States>
__device__ float scan_step(float dt, float dt_u, const float (&B)[States], const float (&C)[States],
                           const float (&a)[States], float (&s)[States]) {
  static_assert(States % 4 == 0, "zamba: a thread has a multiple of four states");
  float sums[States / 4];
#pragma unroll
  for (int n = 0; n < States; ++n) {
    s[n] = ::fmaf(exp2_approximate(dt * a[n]), s[n], dt_u * B[n]);
    sums[n / 4] = n % 4 == 0 ? s[n] * C[n] : ::fmaf(s[n], C[n], sums[n / 4]);
  }
#pragma unroll
  for (int half = 1; half < States / 4; half *= 2)
#pragma unroll
    for (int i = 0; i < States / 4; i += 2 * half) sums[i] += sums[i + half];
  return sums[0];
}

/// Four neighbouring activations as they lie in memory.
template <class A>
struct alignas(4 * sizeof(A)) FourActivations {
  unsigned words[sizeof(A)];

  __device__ float operator[](int i) const {
    if constexpr (std::is_same_v<A, bf16>)
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    else
      return __uint_as_float(words[i]);
  }
};

/// The first `count` of four elements, at most four; zeros for the others. Wide: from an aligned address, all or none.
template <bool Wide, class A>
__device__ FourActivations<A> load_four(const A* from, int count) {
  FourActivations<A> four{};
  if constexpr (Wide) {
    if (count > 0) four = *reinterpret_cast<const FourActivations<A>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) {
        if constexpr (std::is_same_v<A, bf16>)
          four.words[i / 2] |= static_cast<unsigned>(from[i].bits) << i % 2 * 16;
        else
          four.words[i] = __float_as_uint(from[i]);
      }
  }
  return four;
}

/// The first `count` of four values, rounded.
template <bool Wide, class A>
__device__ void store_four(A* to, const float (&values)[4], int count) {
  if constexpr (Wide) {
    if (count <= 0) return;
    FourActivations<A> four;
    if constexpr (std::is_same_v<A, bf16>) {
      four.words[0] = pack_bf16(values[0], values[1]);
      four.words[1] = pack_bf16(values[2], values[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) four.words[i] = __float_as_uint(values[i]);
    }
    *reinterpret_cast<FourActivations<A>*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = A(values[i]);
  }
}

/// A scan in float of channels whose states are Slices_ slices of States_. Wide_: all rows of activations begin at
/// multiples of four elements, and heads and states come in fours.
template <class A_, int Slices_, int States_, bool Wide_>
struct SelectiveScanTraits {
  using A = A_;
  static constexpr int slices = Slices_, states = States_;
  static constexpr bool wide = Wide_;
  static constexpr int threads = 128, blocks = slices * states > 16 ? 2 : 3;  // of a multiprocessor, at least
  static constexpr int channels = threads / slices;                           // of a block
  static constexpr int quads = channels / 4;         // of channels, of which a thread prepares and finishes one
  static constexpr int tokens = threads / quads;     // between two barriers
  static constexpr int group = states == 4 ? 2 : 1;  // tokens whose operands are read while those before are scanned
  static constexpr int state_quads = slices * states / 4;
  static constexpr int pieces = 2 * state_quads * tokens;  // of B and C, four elements each
  static constexpr int loads = (pieces + threads - 1) / threads;
  /// Where a channel's dt and dt u are in a token's line of shared memory. The gaps keep quads of channels, 32 bytes
  /// apart, in different banks.
  __device__ static constexpr int place(int channel) { return 2 * channel + channel / 16 * 4; }
  static constexpr int line = 2 * channels + (channels / 16 - 1) * 4;
  static_assert(scan_chunk % tokens == 0, "zamba: states are kept at multiples of the tokens between two barriers");
  static_assert(threads % (2 * state_quads) == 0 && tokens % 4 == 0, "zamba: threads share tokens evenly");
};

/// `width` neighbouring channels of a head.
struct ScanTile {
  Index row, head, channel;
  int width;
};

/// Tiles of at most `channels` channels: those of a row, then those of the next.
template <class Inputs>
__device__ ScanTile scan_tile(const Inputs& in, int channels) {
  const auto heads = static_cast<unsigned>(in.B.shape[1]), P = static_cast<unsigned>(in.u.cols()) / heads;
  const unsigned per_head = (P + channels - 1) / channels, tile = blockIdx.x % (heads * per_head);
  const unsigned head = tile / per_head, offset = tile % per_head * channels;
  return {blockIdx.x / (heads * per_head), head, Index{head} * P + offset,
          static_cast<int>(::min(static_cast<unsigned>(channels), P - offset))};
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                          Tensor<float, 3> state, Matrix<typename Traits::A> y, Tensor<float, 3> checkpoints) {
  using A = typename Traits::A;
  using Four = FourActivations<A>;
  constexpr int tokens = Traits::tokens, slices = Traits::slices, states = Traits::states;
  constexpr bool wide = Traits::wide;
  alignas(16) __shared__ float steps[2][tokens][Traits::line];  // dt and dt u
  alignas(16) __shared__ float BC[2][tokens][slices][2][states];
  alignas(16) __shared__ float sums[2][slices][tokens][Traits::channels];  // C s of each slice

  const ScanTile tile = scan_tile(in, Traits::channels);
  const Index row = tile.row, begin = sequences.begin(row);
  const int length = static_cast<int>(sequences.length(row)), N = static_cast<int>(in.B.shape[2]);
  if (length == 0) return;

  // What this thread scans: a slice of a channel's states.
  const int slice = threadIdx.x / 32 % slices, channel = threadIdx.x / 32 / slices * 32 + threadIdx.x % 32;
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

  // What it prepares and finishes: four channels of one of the tokens; and fours of B or of C.
  const int quad = threadIdx.x % Traits::quads, token = threadIdx.x / Traits::quads;
  const int quad_width = ::min(tile.width - 4 * quad, 4);
  const Index quad_channel = tile.channel + 4 * quad;
  float bias[4], skip[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bias[i] = i < quad_width ? in.delta_bias[quad_channel + i] : 0.0f;
    skip[i] = i < quad_width ? in.D[quad_channel + i] : 0.0f;
  }
  constexpr bool all_load = Traits::pieces % Traits::threads == 0;
  constexpr int state_quads = Traits::state_quads, piece_tokens = Traits::threads / (2 * state_quads);
  const int piece = threadIdx.x % (2 * state_quads), piece_token = threadIdx.x / (2 * state_quads);
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
  const int piece_step = static_cast<int>(source.stride[0]) * ::min(piece_tokens, tokens);
  const int y_step = static_cast<int>(y.stride[0]) * tokens;

  struct Loaded {
    Four u, delta, pieces[Traits::loads];
  };
  // The next tokens in line, of which the row has `left`.
  const auto load = [&](int left) {
    Loaded loaded;
    const int width = token < left ? quad_width : 0;
    loaded.u = load_four<wide>(u_at, width);
    loaded.delta = load_four<wide>(delta_at, width);
    u_at += u_step;
    delta_at += delta_step;
#pragma unroll
    for (int k = 0; k < Traits::loads; ++k) {
      const int at = piece_token + k * piece_tokens;
      loaded.pieces[k] = load_four<wide>(piece_at, (all_load || at < tokens) && at < left ? piece_width : 0);
      piece_at += piece_step;
    }
    return loaded;
  };
  const auto load_z = [&](int left) {
    const Four z = load_four<wide>(z_at, token < left ? quad_width : 0);
    z_at += z_step;
    return z;
  };
  // Two of the four channels. Past the end delta is so small that dt is 0, which costs no branch.
  constexpr float none = -1e30f;
  const auto prepare = [&](int buffer, int left, const Loaded& loaded, int pair) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float delta = loaded.delta[2 * pair + i] + bias[2 * pair + i];
      const float dt = scan_softplus(token < left ? delta : none);
      values[2 * i] = dt;
      values[2 * i + 1] = dt * loaded.u[2 * pair + i];
    }
    *reinterpret_cast<float4*>(&steps[buffer][token][Traits::place(4 * quad) + 4 * pair]) =
        make_float4(values[0], values[1], values[2], values[3]);
  };
  const auto prepare_pieces = [&](int buffer, const Loaded& loaded) {
#pragma unroll
    for (int k = 0; k < Traits::loads; ++k) {
      const int at = piece_token + k * piece_tokens;
      const Four& four = loaded.pieces[k];
      if (all_load || at < tokens)
        *reinterpret_cast<float4*>(&BC[buffer][at][piece_state / states][of_C][piece_state % states]) =
            make_float4(four[0], four[1], four[2], four[3]);
    }
  };
  // What the scan of `group` tokens reads.
  constexpr int group = Traits::group;
  struct Operands {
    float2 steps[group];
    float B[group][states], C[group][states];
  };
  const auto operands = [&](int buffer, int t) {
    Operands read;
#pragma unroll
    for (int k = 0; k < group; ++k) {
      read.steps[k] = *reinterpret_cast<const float2*>(&steps[buffer][t + k][Traits::place(channel)]);
#pragma unroll
      for (int n = 0; n < states; n += 4) {
        const float4 b = *reinterpret_cast<const float4*>(&BC[buffer][t + k][slice][0][n]);
        const float4 c = *reinterpret_cast<const float4*>(&BC[buffer][t + k][slice][1][n]);
        read.B[k][n] = b.x, read.B[k][n + 1] = b.y, read.B[k][n + 2] = b.z, read.B[k][n + 3] = b.w;
        read.C[k][n] = c.x, read.C[k][n + 1] = c.y, read.C[k][n + 2] = c.z, read.C[k][n + 3] = c.w;
      }
    }
    return read;
  };
  // The sums over the slices of four channels.
  const auto total = [&](int buffer, float(&to)[4]) {
    float parts[slices][4];
#pragma unroll
    for (int k = 0; k < slices; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(&sums[buffer][k][token][4 * quad]);
      parts[k][0] = part.x, parts[k][1] = part.y, parts[k][2] = part.z, parts[k][3] = part.w;
    }
#pragma unroll
    for (int half = 1; half < slices; half *= 2)
#pragma unroll
      for (int k = 0; k < slices; k += 2 * half)
#pragma unroll
        for (int i = 0; i < 4; ++i) parts[k][i] += parts[k + half][i];
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = parts[0][i];
  };

  Loaded ahead = load(length);
  prepare(0, length, ahead, 0);
  prepare(0, length, ahead, 1);
  prepare_pieces(0, ahead);
  Four u_now = ahead.u, u_before{}, z_before{};
  ahead = load(length - tokens);
  __syncthreads();

  int buffer = 0;
  for (int first = 0; first < length; first += tokens, buffer ^= 1) {
    const int left = length - first;
    if (checkpoints && first % static_cast<int>(scan_chunk) == 0)
      keep(checkpoints[begin / scan_chunk + row + first / static_cast<int>(scan_chunk)]);
    Operands coming = operands(buffer, 0);
    const Loaded next = load(left - 2 * tokens);
    const Four z_now = load_z(left);
    float out[4];
    total(buffer ^ 1, out);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
      for (int t = part * tokens / 4; t < (part + 1) * tokens / 4; t += group) {
        const Operands now = coming;
        if (t + group < tokens) coming = operands(buffer, t + group);
#pragma unroll
        for (int k = 0; k < group; ++k)
          sums[buffer][slice][t + k][channel] =
              scan_step<states>(now.steps[k].x, now.steps[k].y, now.B[k], now.C[k], a, s);
      }
      out[part] = scan_output(out[part], skip[part], u_before[part], z_before[part]);
      if (part % 2 == 0) prepare(buffer ^ 1, left - tokens, ahead, part / 2);
      if (part == 1) prepare_pieces(buffer ^ 1, ahead);
    }
    if (first > 0) {
      store_four<wide>(y_at, out, quad_width);
      y_at += y_step;
    }
    u_before = u_now;
    u_now = ahead.u;
    z_before = z_now;
    ahead = next;
    __syncthreads();
  }
  float out[4];
  total(buffer ^ 1, out);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = scan_output(out[i], skip[i], u_before[i], z_before[i]);
  store_four<wide>(y_at, out, token < (length - 1) % tokens + 1 ? quad_width : 0);
  if (state) keep(state[row]);
}

/// Single tokens: a warp takes a slice of 32 channels of Rows rows, of which all loads are issued before the first
/// result.
template <class Traits, int Rows>
__global__ void __launch_bounds__(Traits::threads)
    selective_scan_token_kernel(SelectiveScanInputs<typename Traits::A, float> in, Sequences sequences,
                                Tensor<float, 3> state, Matrix<typename Traits::A> y) {
  using A = typename Traits::A;
  constexpr int slices = Traits::slices, states = Traits::states;
  static_assert(Traits::channels == 32, "zamba: a warp has a slice");
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

/// The constants of a scan by one thread a channel, of activations A_ with at most States_ states.
template <class A_, int States_>
struct ChannelScanTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int states = States_;
  static constexpr int threads = 64;
  static constexpr int unroll = states <= 32 ? states : 1;  // unrolled wholly, arrays over n are registers
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    channel_scan_kernel(SelectiveScanInputs<typename Traits::A, typename Traits::F> in, Sequences sequences,
                        Tensor<typename Traits::F, 3> state, Matrix<typename Traits::A> y,
                        Tensor<typename Traits::F, 3> checkpoints) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  const Index channels = in.u.cols(), N = in.B.shape[2];
  const Index tiles = (channels + Traits::threads - 1) / Traits::threads;
  const Index row = blockIdx.x / tiles, c = blockIdx.x % tiles * Traits::threads + threadIdx.x;
  if (c >= channels || sequences.length(row) == 0) return;
  const Index head = c / (channels / in.B.shape[1]);
  const Index begin = sequences.begin(row), end = begin + sequences.length(row);
  const F bias = in.delta_bias[c], skip = in.D[c];
  const bool continued = state && sequences.start(row) > 0;

  F a[Traits::states], s[Traits::states];
#pragma unroll Traits::unroll
  for (int n = 0; n < Traits::states; ++n) {
    a[n] = n < N ? -::exp(in.A_log(c, n)) : F(0);
    s[n] = continued && n < N ? state(row, n, c) : F(0);
  }
  const Index first_checkpoint = begin / scan_chunk + row;
  for (Index t = begin; t < end; ++t) {
    if (checkpoints && (t - begin) % scan_chunk == 0) {
      const Index k = first_checkpoint + (t - begin) / scan_chunk;
#pragma unroll Traits::unroll
      for (int n = 0; n < Traits::states; ++n)
        if (n < N) checkpoints(k, n, c) = s[n];
    }
    const A* B = &in.B(t, head, 0);
    const A* C = &in.C(t, head, 0);
    const F delta = F(in.delta(t, c)) + bias, u = F(in.u(t, c)), z = F(in.z(t, c));
    const F dt = delta > F(20) ? delta : ::log1p(::exp(delta)), dt_u = dt * u;
    F sum = skip * u;
#pragma unroll Traits::unroll
    for (int n = 0; n < Traits::states; ++n)
      if (n < N) {
        s[n] = ::exp(dt * a[n]) * s[n] + dt_u * F(B[n]);
        sum += s[n] * F(C[n]);
      }
    y(t, c) = A(sum * z / (F(1) + ::exp(-z)));
  }
  if (state) {
#pragma unroll Traits::unroll
    for (int n = 0; n < Traits::states; ++n)
      if (n < N) state(row, n, c) = s[n];
  }
}

}  // namespace detail

template <>
struct SelectiveScan<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                      Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    if (sequences.tokens == 0) return;
    const Index N = in.B.shape[2];
    require(N <= 256, "selective_scan: on CUDA d_state is at most 256, got ", N);
    if constexpr (std::is_same_v<F, double>) {
      if (N <= 32)
        launch_channels<detail::ChannelScanTraits<A, 32>>(ctx, in, sequences, state, y, checkpoints);
      else
        launch_channels<detail::ChannelScanTraits<A, 256>>(ctx, in, sequences, state, y, checkpoints);
    } else if (N <= 32) {
      if (wide(in, y))
        launch_slices<A, true>(ctx, in, sequences, state, y, checkpoints);
      else
        launch_slices<A, false>(ctx, in, sequences, state, y, checkpoints);
    } else {
      launch_channels<detail::ChannelScanTraits<A, 256>>(ctx, in, sequences, state, y, checkpoints);
    }
  }

 private:
  template <class T, int Rank>
  static bool in_fours(Tensor<T, Rank> tensor) {
    return detail::aligned(tensor, 4) && tensor.cols() % 4 == 0;
  }
  template <class A>
  static bool wide(const SelectiveScanInputs<A, float>& in, Matrix<A> y) {
    return in.u.cols() / in.B.shape[1] % 4 == 0 && in_fours(in.u) && in_fours(in.delta) && in_fours(in.z) &&
           in_fours(in.B) && in_fours(in.C) && in_fours(in.A_log) && in_fours(y);
  }

  template <class A>
  static unsigned tiles(const SelectiveScanInputs<A, float>& in, int channels) {
    const Index heads = in.B.shape[1], P = in.u.cols() / heads;
    return static_cast<unsigned>(heads * ((P + channels - 1) / channels));
  }

  template <class A, bool Wide>
  static void launch_slices(Context<cuda>& ctx, const SelectiveScanInputs<A, float>& in, const Sequences& sequences,
                            Tensor<float, 3> state, Matrix<A> y, Tensor<float, 3> checkpoints) {
    const Index N = in.B.shape[2];
    if (N <= 16) {
      // Slices of 8 states from two blocks a multiprocessor on. The order of the sums is the same.
      using Fewer = detail::SelectiveScanTraits<A, 2, 8, Wide>;
      if (sequences.longest > 1 && sequences.rows * tiles(in, Fewer::channels) >= 2 * ctx.multiprocessors())
        launch_tokens<Fewer>(ctx, in, sequences, state, y, checkpoints);
      else
        launch<detail::SelectiveScanTraits<A, 4, 4, Wide>>(ctx, in, sequences, state, y, checkpoints);
    } else {
      launch<detail::SelectiveScanTraits<A, 4, 8, Wide>>(ctx, in, sequences, state, y, checkpoints);
    }
  }

  template <class Traits, class A>
  static void launch(Context<cuda>& ctx, const SelectiveScanInputs<A, float>& in, const Sequences& sequences,
                     Tensor<float, 3> state, Matrix<A> y, Tensor<float, 3> checkpoints) {
    if (sequences.longest > 1 || checkpoints) return launch_tokens<Traits>(ctx, in, sequences, state, y, checkpoints);
    // Two rows a block, where there are enough of them, have twice the loads under way and read A_log once.
    const Index across = tiles(in, Traits::channels), filled = 16 * ctx.multiprocessors();
    if (sequences.rows * across >= filled)
      detail::selective_scan_token_kernel<Traits, 2>
          <<<static_cast<unsigned>((sequences.rows + 1) / 2 * across), Traits::threads, 0, ctx.stream()>>>(
              in, sequences, state, y);
    else
      detail::selective_scan_token_kernel<Traits, 1>
          <<<static_cast<unsigned>(sequences.rows * across), Traits::threads, 0, ctx.stream()>>>(in, sequences, state,
                                                                                                 y);
    detail::check_launch("selective_scan: single tokens");
  }

  template <class Traits, class A>
  static void launch_tokens(Context<cuda>& ctx, const SelectiveScanInputs<A, float>& in, const Sequences& sequences,
                            Tensor<float, 3> state, Matrix<A> y, Tensor<float, 3> checkpoints) {
    const auto blocks = static_cast<unsigned>(sequences.rows * tiles(in, Traits::channels));
    detail::selective_scan_kernel<Traits>
        <<<blocks, Traits::threads, 0, ctx.stream()>>>(in, sequences, state, y, checkpoints);
    detail::check_launch("selective_scan");
  }

  template <class Traits, class A, class F>
  static void launch_channels(Context<cuda>& ctx, const SelectiveScanInputs<A, F>& in, const Sequences& sequences,
                              Tensor<F, 3> state, Matrix<A> y, Tensor<F, 3> checkpoints) {
    const Index across = (in.u.cols() + Traits::threads - 1) / Traits::threads;
    const auto blocks = static_cast<unsigned>(sequences.rows * across);
    detail::channel_scan_kernel<Traits>
        <<<blocks, Traits::threads, 0, ctx.stream()>>>(in, sequences, state, y, checkpoints);
    detail::check_launch("selective_scan");
  }
};

}  // namespace zamba
