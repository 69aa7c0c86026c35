// SPDX-License-Identifier: MIT
// ssd of bf16 by tensor cores: long rows, in chunks of 64 tokens; equations in ssd.hpp.
//
// A block takes one head of one row, or 64 channels of it, from the first chunk to the last, so that the state stays in
// the block and u and y cross memory once. With l_t the logarithm of e_t, S the state before the chunk:
//   y = (K * C B^T * dt) u + e (C S) + D u       a warp takes 16 tokens of the chunk, all of its channels
//   S = e_last S + (f dt u)^T B                  a warp takes 16 channels, all n, and leads by one chunk
// The matrix of 64 x 64 lives in registers, 16 x 32 at a time; S too, in float, and goes through shared memory, as
// bf16, to the warps that multiply it by C. The warps of the state have less to multiply, so they also bring u, B and C
// of the chunks to come; that of a chunk's first 16 tokens, which need the least of the matrix, computes dt and l of
// the next one.
//
// A row's chunks form segments of eight. The state in a segment is kept as two: what its own tokens made of 0, and the
// state before it, which decays. So a segment's own part needs no segment before it. Where one block for each row and
// head would leave the GPU half empty, a block takes one segment instead, and two kernels come first: one makes the own
// part of every segment, the other goes through these and finds the states before the segments. They do the same
// arithmetic as one block for the whole row, bit by bit.
//
// Chunks begin at a row's first token of the call, so nothing depends on the other rows. A step's decay below 2^-128
// counts as 2^-128, of which exp2_approximate makes 0: so |l| is at most 2^13, and differences of two are good to
// 2^-10.
//
// Numeric contract: sums in float; factors of products are rounded to bf16: u, B, C as they are stored, the matrix,
// f dt u, and S where C multiplies it. So y and the state are within 2^-8 of the float recurrence by norm, and so are
// two cuts of a sequence. Steps are in a fixed order: a rerun is bit-equal.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>

namespace zamba::kernel {

/// States and channels that a block has room for; what is not there is 0. Outputs_: it computes y, not the state only.
template <int N_, int P_, bool Outputs_ = true>
struct SsdProductTraits {
  static constexpr int N = N_, P = P_, Q = 64;  // Q: tokens of a chunk
  static constexpr bool outputs = Outputs_;
  static constexpr int segment = 8;               // chunks
  static constexpr int stages = outputs ? 2 : 4;  // chunks in shared memory: one in use, the others on their way
  static constexpr int token_warps = outputs ? Q / 16 : 0, state_warps = P / 16;
  static constexpr int threads = 32 * (token_warps + state_warps);
  static constexpr int blocks = (N <= 64 ? 2 : 1) * (outputs ? 1 : 2);  // on a multiprocessor
  static_assert(Q == 64, "zamba: a lane of one warp has two tokens of a chunk");
  static_assert(P <= N, "zamba: a warp gathers its rows of y where its rows of C were");
};

/// A place in a tile of rows of Width bf16 in shared memory, of which pieces of 16 bytes are permuted so that eight
/// rows' are in different banks. `at` counts from `memory`, where tiles begin at multiples of their width: so a place
/// to the right is one exclusive or away.
template <int Width>
struct SsdPlace {
  bf16* memory;
  int at;

  /// In the tile that begins here; column is a multiple of 8.
  __device__ SsdPlace in_tile(int row, int column) const {
    constexpr int pieces = Width / 8;
    const int turn = pieces >= 8 ? row & 7 : (row >> 1) & (pieces - 1);
    return {memory, at + row * Width + ((column / 8) ^ turn) * 8};
  }
  /// rows: a multiple of 8; column: a multiple of 8 of no bit that the column of this place has.
  __device__ bf16* further(int rows, int column) const { return memory + ((at ^ column) + rows * Width); }
  __device__ SsdPlace operator+(int elements) const { return {memory, at + elements}; }
};

/// Shared memory of a block: chunks (u, B, C) in turn, the states before even and odd ones, and their dt and l. What
/// only outputs need is C, those states, and the one before the segment in float.
template <class Traits>
struct SsdShared {
  static constexpr int u_size = Traits::Q * Traits::P, B_size = Traits::Q * Traits::N;
  static constexpr int stage_size = u_size + B_size * (Traits::outputs ? 2 : 1);
  static constexpr int state_size = Traits::outputs ? Traits::P * Traits::N : 0;
  static constexpr int tiles = Traits::stages * stage_size + 2 * state_size;
  static constexpr std::size_t bytes = tiles * sizeof(bf16) + (4 * Traits::Q + state_size) * sizeof(float);

  bf16* memory;

  __device__ SsdPlace<Traits::P> u(int chunk) const { return {memory, chunk % Traits::stages * stage_size}; }
  __device__ SsdPlace<Traits::N> B(int chunk) const { return {memory, chunk % Traits::stages * stage_size + u_size}; }
  __device__ SsdPlace<Traits::N> C(int chunk) const { return B(chunk) + B_size; }
  /// (P, N)
  __device__ SsdPlace<Traits::N> state(int chunk) const {
    return {memory, Traits::stages * stage_size + chunk % 2 * state_size};
  }
  __device__ float* dt(int chunk) const { return reinterpret_cast<float*>(memory + tiles) + chunk % 2 * Traits::Q; }
  __device__ float* l(int chunk) const { return dt(chunk) + 2 * Traits::Q; }
  __device__ float* start() const { return dt(0) + 4 * Traits::Q; }
};

/// Where blocks take segments: what they hand on. Nothing where a block takes a whole row.
struct SsdSegments {
  Tensor<float, 3> states;  // (parts of all rows, count, P N) the state before each segment, as threads have them
  Matrix<float> decays;     // (parts of all rows, count) the logarithm of the decay in the segment before
  int count = 1;            // blocks for a part of a row
};

/// What the warps of a block have in common: a head's share of a row, or of a segment of it.
template <class Traits>
struct SsdPart {
  Index begin, length, row;    // of the block's tokens
  Index of_row;                // tokens
  Index index;                 // among the parts of all rows
  int segment;                 // that it begins with
  Index head, group, channel;  // the first channel
  int channels;                // at most P
  int states;                  // at most N

  __device__ SsdPart(const SsdInputs<bf16, float>& in, const Sequences& sequences, int segments) {
    const Index heads = in.delta.cols(), per_head = in.u.cols() / heads;
    const Index parts = ceil_div(per_head, Traits::P);
    segment = static_cast<int>(blockIdx.x % segments);
    index = blockIdx.x / segments;
    const Index part = index % parts;
    row = index / (parts * heads);
    head = index / parts % heads;
    group = head / (heads / in.B.shape[1]);
    channel = head * per_head + part * Traits::P;
    channels = static_cast<int>(::min(per_head - part * Traits::P, Index{Traits::P}));
    states = static_cast<int>(in.B.shape[2]);
    constexpr Index tokens = Traits::segment * Traits::Q;
    of_row = sequences.length(row);
    begin = sequences.begin(row) + segment * tokens;
    length = ::max(Index{0}, of_row - segment * tokens);
    if (segments > 1 || !Traits::outputs) length = ::min(length, tokens);
  }
  __device__ bool ends_row() const { return segment * Index{Traits::segment * Traits::Q} + length == of_row; }
  __device__ int chunks() const { return static_cast<int>(ceil_div(length, Traits::Q)); }
  /// Tokens of a chunk; 0 behind the last one.
  __device__ int count(int chunk) const {
    return static_cast<int>(::max(Index{0}, ::min(Index{Traits::Q}, length - Index{chunk} * Traits::Q)));
  }
};

/// Keeps time: dt and l of chunks, by one warp for each of them.
template <class Traits>
class SsdClock {
 public:
  __device__ SsdClock(const SsdInputs<bf16, float>& in, const SsdPart<Traits>& part, SsdShared<Traits> shared)
      : in_(in),
        part_(part),
        shared_(shared),
        lane_(threadIdx.x % 32),
        a_(-::exp(in.A_log[part.head]) * log2_e),
        bias_(in.dt_bias[part.head]),
        least_(static_cast<float>(in.dt_min)) {}

  /// Asks for a chunk's delta, which keep() takes.
  __device__ void ask(int chunk) {
    const int count = part_.count(chunk);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane_ + i;
      delta_[i] = t < count ? float(in_.delta(part_.begin + Index{chunk} * Traits::Q + t, part_.head)) : 0.0f;
    }
  }

  /// dt and l of the chunk that was asked for; a token that is not there has dt 0 and a decay of 1.
  __device__ void keep(int chunk) const {
    const int count = part_.count(chunk);
    float dt[2], step[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = delta_[i] + bias_;
      const bool there = 2 * lane_ + i < count;
      dt[i] = there ? ::max(least_, x > 20 ? x : ::log1p(::exp(x))) : 0.0f;
      step[i] = there ? ::max(dt[i] * a_, -128.0f) : 0.0f;
    }
    float sum = step[0] + step[1];
    for (int distance = 1; distance < 32; distance *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane_ >= distance) sum += before;
    }
    float before = __shfl_up_sync(0xffffffffu, sum, 1);
    if (lane_ == 0) before = 0;
    float *const to = shared_.dt(chunk) + 2 * lane_, *const logarithm = shared_.l(chunk) + 2 * lane_;
    to[0] = dt[0];
    to[1] = dt[1];
    logarithm[0] = before + step[0];
    logarithm[1] = sum;
  }

 private:
  const SsdInputs<bf16, float>& in_;
  const SsdPart<Traits>& part_;
  SsdShared<Traits> shared_;
  int lane_;
  float a_, bias_, least_;  // a: in powers of 2
  float delta_[2] = {};
};

/// Brings u, B and C of chunks: the part of one thread of the state warps.
template <class Traits>
class SsdCarrier {
 public:
  __device__ SsdCarrier(const SsdInputs<bf16, float>& in, const SsdPart<Traits>& part, SsdShared<Traits> shared)
      : in_(in), part_(part), shared_(shared), thread_(threadIdx.x - 32 * Traits::token_warps) {}

  /// Begins to bring the first chunks.
  __device__ void begin() const {
    for (int chunk = 0; chunk + 1 < Traits::stages; ++chunk) bring(chunk);
  }

  /// Waits for a chunk, with all warps of the block, and begins to bring one into the place of the chunk before it.
  __device__ void wait_for(int chunk) const {
    copy_async_wait<Traits::stages - 2>();
    __syncthreads();
    bring(chunk + Traits::stages - 1);
  }

 private:
  /// Begins to copy a chunk; one group of copies, though there may be none.
  __device__ void bring(int chunk) const {
    const int count = part_.count(chunk);
    const Index first = part_.begin + Index{chunk} * Traits::Q;
    if (count > 0) {
      copy<Traits::P>(&in_.u(first, part_.channel), in_.u.stride[0], count, part_.channels, shared_.u(chunk));
      copy<Traits::N>(&in_.B(first, part_.group, 0), in_.B.stride[0], count, part_.states, shared_.B(chunk));
      if constexpr (Traits::outputs)
        copy<Traits::N>(&in_.C(first, part_.group, 0), in_.C.stride[0], count, part_.states, shared_.C(chunk));
    }
    copy_async_commit();
  }

  /// (Q, Width), zeros outside of (count, columns).
  template <int Width>
  __device__ void copy(const bf16* from, Index stride, int count, int columns, SsdPlace<Width> to) const {
    constexpr int pieces = Width / 8;
    const int column = thread_ % pieces * 8;
#pragma unroll 4
    for (int row = thread_ / pieces; row < Traits::Q; row += 32 * Traits::state_warps / pieces) {
      const bool there = row < count && column < columns;
      copy_async(to.in_tile(row, column).further(0, 0), there ? from + row * stride + column : from, there);
    }
  }

  const SsdInputs<bf16, float>& in_;
  const SsdPart<Traits>& part_;
  SsdShared<Traits> shared_;
  int thread_;
};

/// A warp that keeps the state of 16 channels, transposed: s[j] is the fragment of 16 channels and n = 8 j ... 8 j + 7.
/// s is what the segment has made of 0; with it goes what is left of `start`, the state before the segment.
template <class Traits>
struct SsdStateWarp {
  static constexpr int pieces = Traits::N / 8, threads = 32 * Traits::state_warps;
  float s[pieces][4];
  float decay;      // of the segment up to here, its logarithm
  int lane, first;  // channel of the block's
  int thread;       // of those that keep the state

  __device__ SsdStateWarp() : s{}, decay(0), lane(threadIdx.x % 32), thread(threadIdx.x - 32 * Traits::token_warps) {
    first = thread / 32 * 16;
  }

  /// A thread's part of P N floats.
  __device__ float4& piece(float* of, int j) const { return reinterpret_cast<float4*>(of)[j * threads + thread]; }

  /// f(place, n, channel) for the elements that are there; place: where an array of P N floats has them.
  template <class F>
  __device__ void for_elements(const SsdPart<Traits>& part, F&& f) const {
#pragma unroll
    for (int j = 0; j < pieces; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 8 * j + 2 * (lane % 4) + i % 2, p = first + lane / 4 + i / 2 * 8;
        if (n < part.states && p < part.channels) f(4 * (j * threads + thread) + i, n, part.channel + p);
      }
  }

  /// The state before a row: that of its past, or 0.
  __device__ void begin_row(const SsdPart<Traits>& part, const Tensor<float, 3>& past, float* start) const {
#pragma unroll
    for (int j = 0; j < pieces; ++j) piece(start, j) = make_float4(0, 0, 0, 0);
    if (past) for_elements(part, [&](int at, Index n, Index c) { start[at] = past(part.row, n, c); });
  }

  /// The state here becomes the one before a further segment.
  __device__ void begin_segment(float* start) {
    const float left = exp2_approximate(decay);
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      const float4 before = piece(start, j);
      piece(start, j) = make_float4(::fmaf(left, before.x, s[j][0]), ::fmaf(left, before.y, s[j][1]),
                                    ::fmaf(left, before.z, s[j][2]), ::fmaf(left, before.w, s[j][3]));
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0;
    }
    decay = 0;
  }

  __device__ void store(const SsdPart<Traits>& part, const float* start, const Matrix<float>& to) const {
    const float left = exp2_approximate(decay);
    for_elements(part,
                 [&](int at, Index n, Index c) { to(n, c) = ::fmaf(left, start[at], s[at / 4 / threads][at % 4]); });
  }

  __device__ void share(float* start, SsdPlace<Traits::N> state) const {
    const float left = exp2_approximate(decay);
    const auto to = state.in_tile(first + lane / 4, 0) + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      const float4 before = piece(start, j);
      *reinterpret_cast<unsigned*>(to.further(0, 8 * j)) =
          pack_bf16(::fmaf(left, before.x, s[j][0]), ::fmaf(left, before.y, s[j][1]));
      *reinterpret_cast<unsigned*>(to.further(8, 8 * j)) =
          pack_bf16(::fmaf(left, before.z, s[j][2]), ::fmaf(left, before.w, s[j][3]));
    }
  }

  /// Over a chunk.
  __device__ void advance(SsdShared<Traits> shared, int chunk) {
    const float *const dt = shared.dt(chunk), *const l = shared.l(chunk);
    const auto u_named = shared.u(chunk).in_tile(lane % 8 + lane / 16 * 8, first + lane / 8 % 2 * 8);
    const auto B_named = shared.B(chunk).in_tile(lane % 16, lane / 16 * 8);
    const float last = l[Traits::Q - 1], of_chunk = exp2_approximate(last);
    decay += last;
#pragma unroll
    for (int j = 0; j < Traits::N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= of_chunk;
#pragma unroll
    for (int k = 0; k < Traits::Q; k += 16) {
      unsigned u[4];
      ldmatrix_transposed(u, u_named.further(k, 0));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = k + 8 * half + 2 * (lane % 4);
        const float f0 = exp2_approximate(last - l[t]) * dt[t], f1 = exp2_approximate(last - l[t + 1]) * dt[t + 1];
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          u[i] = pack_bf16(f0 * __uint_as_float(u[i] << 16), f1 * __uint_as_float(u[i] & 0xffff0000u));
      }
#pragma unroll
      for (int n = 0; n < Traits::N; n += 16) {
        unsigned B[4];
        ldmatrix_transposed(B, B_named.further(k, n));
        mma_m16n8k16(s[n / 8], u, {B[0], B[1]});
        mma_m16n8k16(s[n / 8 + 1], u, {B[2], B[3]});
      }
    }
  }
};

/// y of 16 tokens of a chunk, from `first` on, by a warp. y: where the chunk's begins.
template <class Traits>
__device__ void ssd_outputs(SsdShared<Traits> shared, int chunk, int first, int count, float skip, int channels,
                            bf16* y, Index y_stride) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float *const dt = shared.dt(chunk), *const l = shared.l(chunk), l_row[2] = {l[first + g], l[first + g + 8]};
  // The pieces that a lane names: of C; of matrices whose rows are the columns of a product; and of u.
  const auto C_named = shared.C(chunk).in_tile(first + lane % 16, lane / 16 * 8);
  const auto B_named = shared.B(chunk).in_tile(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const auto state_named = shared.state(chunk).in_tile(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const auto u_named = shared.u(chunk).in_tile(lane % 16, lane / 16 * 8);

  unsigned C[Traits::N / 16][4];
#pragma unroll
  for (int n = 0; n < Traits::N; n += 16) ldmatrix(C[n / 16], C_named.further(0, n));

  float sums[Traits::P / 8][4] = {};
#pragma unroll
  for (int n = 0; n < Traits::N; n += 16)
#pragma unroll
    for (int p = 0; p < Traits::P; p += 16) {
      unsigned s[4];
      ldmatrix(s, state_named.further(p, n));
      mma_m16n8k16(sums[p / 8], C[n / 16], {s[0], s[1]});
      mma_m16n8k16(sums[p / 8 + 1], C[n / 16], {s[2], s[3]});
    }
  const float e[2] = {exp2_approximate(l_row[0]), exp2_approximate(l_row[1])};
#pragma unroll
  for (int j = 0; j < Traits::P / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] *= e[i / 2];

      // Columns of the matrix, 32 at a time: four sums run side by side.
#pragma unroll 1
  for (int k = 0; k < first + 16; k += 32) {
    float CB[4][4] = {};
#pragma unroll
    for (int n = 0; n < Traits::N; n += 16)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        unsigned B[4];
        ldmatrix(B, B_named.further(k + 8 * j, n));
        mma_m16n8k16(CB[j], C[n / 16], {B[0], B[1]});
        mma_m16n8k16(CB[j + 1], C[n / 16], {B[2], B[3]});
      }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = k + 8 * j + 2 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column + i % 2, row = first + g + i / 2 * 8;
        const float value = CB[j][i] * (exp2_approximate(l_row[i / 2] - l[at]) * dt[at]);
        CB[j][i] = at <= row ? value : 0.0f;  // later ones may have overflowed
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned M[4] = {pack_bf16(CB[2 * half][0], CB[2 * half][1]), pack_bf16(CB[2 * half][2], CB[2 * half][3]),
                             pack_bf16(CB[2 * half + 1][0], CB[2 * half + 1][1]),
                             pack_bf16(CB[2 * half + 1][2], CB[2 * half + 1][3])};
#pragma unroll
      for (int p = 0; p < Traits::P; p += 16) {
        unsigned u[4];
        ldmatrix_transposed(u, u_named.further(k + 16 * half, p));
        mma_m16n8k16(sums[p / 8], M, {u[0], u[1]});
        mma_m16n8k16(sums[p / 8 + 1], M, {u[2], u[3]});
      }
    }
  }

  __syncwarp();  // all lanes have their part of C
  const auto u_own = shared.u(chunk).in_tile(first + g, 0) + 2 * t;
  const auto y_own = shared.C(chunk).in_tile(first + g, 0) + 2 * t;
#pragma unroll
  for (int j = 0; j < Traits::P / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned u = *reinterpret_cast<const unsigned*>(u_own.further(8 * i, 8 * j));
      *reinterpret_cast<unsigned*>(y_own.further(8 * i, 8 * j)) =
          pack_bf16(sums[j][2 * i] + skip * __uint_as_float(u << 16),
                    sums[j][2 * i + 1] + skip * __uint_as_float(u & 0xffff0000u));
    }
  __syncwarp();
  constexpr int pieces = Traits::P / 8;
  const int column = lane % pieces * 8;
#pragma unroll
  for (int row = lane / pieces; row < 16; row += 32 / pieces)
    if (first + row < count && column < channels)
      *reinterpret_cast<uint4*>(y + (first + row) * y_stride + column) =
          *reinterpret_cast<const uint4*>(shared.C(chunk).in_tile(first + row, column).further(0, 0));
}

/// Rows of more than few_tokens. checkpoints, optional: the states before the chunks, as ssd() keeps them for Q.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    ssd_products_kernel(SsdInputs<bf16, float> in, Sequences sequences, Tensor<float, 3> state, Matrix<bf16> y,
                        Tensor<float, 3> checkpoints, SsdSegments segments, Index few_tokens) {
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdPart<Traits> part(in, sequences, segments.count);
  if (part.of_row <= few_tokens || part.length == 0) return;
  const int warp = threadIdx.x / 32;
  const int chunks = part.chunks();

  // Warps go their own ways between the barriers, of which each meets as many.
  if (warp >= Traits::token_warps) {
    SsdCarrier<Traits> carrier(in, part, shared);
    carrier.begin();
    SsdStateWarp<Traits> own;
    float* const start = shared.start();
    if (segments.states) {
#pragma unroll
      for (int j = 0; j < own.pieces; ++j)
        own.piece(start, j) = own.piece(&segments.states(part.index, part.segment, 0), j);
    } else {
      own.begin_row(part, sequences.start(part.row) > 0 ? state : Tensor<float, 3>{}, start);
    }
    own.share(start, shared.state(0));
    for (int chunk = 0; chunk < chunks; ++chunk) {
      carrier.wait_for(chunk);
      if (checkpoints) {
        const Index of_row = part.segment * Traits::segment + chunk;
        own.store(part, start, checkpoints[sequences.begin(part.row) / Traits::Q + part.row + of_row]);
      }
      own.advance(shared, chunk);
      if ((chunk + 1) % Traits::segment == 0) own.begin_segment(start);
      own.share(start, shared.state(chunk + 1));
    }
    if (state && part.ends_row()) own.store(part, start, state[part.row]);
  } else {
    const float skip = in.D[part.head];
    SsdClock<Traits> clock(in, part, shared);
    if (warp == 0) {
      clock.ask(0);
      clock.keep(0);
    }
    bf16* to = &y(part.begin, part.channel);
    for (int chunk = 0; chunk < chunks; ++chunk, to += Traits::Q * y.stride[0]) {
      __syncthreads();
      // Later tokens take longer, so warps take turns, and that of the first ones also keeps time for the next chunk.
      const int first = (warp + chunk) % Traits::token_warps * 16, count = part.count(chunk);
      if (first == 0) clock.ask(chunk + 1);
      if (first < count) ssd_outputs(shared, chunk, first, count, skip, part.channels, to, y.stride[0]);
      if (first == 0) clock.keep(chunk + 1);
    }
  }
}

}  // namespace zamba::kernel
