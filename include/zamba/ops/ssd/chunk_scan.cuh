// SPDX-License-Identifier: MIT
// The chunk scan of ssd: long rows of bf16, in chunks of 64 tokens, as products on tensor cores; equations in ssd.hpp.
//
// A block takes one head of one row, or 64 channels of it, from the first chunk to the last, so that the state stays in
// the block and u and y cross memory once. What Mamba-2 computes by five kernels is fused into this one. With l_t the
// logarithm of e_t, S the state before the chunk, K_tj = 2^(l_t - l_j) for j <= t, else 0:
//
//   y_t = e_t C_t S                                inter-chunk: what the state before the chunk gives
//       + sum_j (K * C B^T)_tj dt_j u_j + D u_t    intra-chunk
//   S   = e_last S + (f dt u)^T B                  chunk state and state passing, see chunk_state.cuh
//
// Warps are specialised:
//   state warps     producers: load u, B and C of the chunks to come (tile.cuh), and lead by one chunk with S, of which
//                   each keeps 16 channels in registers, in float, and shares them in shared memory, as bf16
//   output warps    consumers: each takes 16 tokens of a chunk, all channels of them. The matrix of 64 x 64 lives in
//                   registers, 16 x 32 at a time. The warp of a chunk's first 16 tokens, which need the least of the
//                   matrix, computes dt and l of the next chunk
//
// A row's chunks form segments of eight. Where one block for each row and head would leave the GPU half empty, a block
// takes one segment instead, and the kernels of state_passing.cuh come first.
//
// Chunks begin at a row's first token of the call, so nothing depends on the other rows.
//
// Numeric contract: sums in float; factors of products are rounded to bf16: u, B, C as they are stored, the matrix,
// f dt u, and S where C multiplies it. So y and the state are within 2^-8 of the float recurrence by norm, and so are
// two cuts of a sequence. Steps are in a fixed order: a rerun is bit-equal.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/chunk_state.cuh>
#include <zamba/ops/ssd/state_passing.cuh>
#include <zamba/ops/ssd/tile.cuh>

namespace zamba::kernel {

/// y of 16 tokens of a chunk, from `first` on, by an output warp. Fragments are a, b and c of mma.cuh, g and t as
/// there: tokens first + g and first + g + 8 are this lane's rows of a and c.
template <class Traits>
class SsdOutput {
 public:
  __device__ SsdOutput(SsdShared<Traits> shared, int chunk, int first)
      : shared_(shared),
        chunk_(chunk),
        first_(first),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        dt_(shared.dt(chunk)),
        l_(shared.l(chunk)),
        l_row_{l_[first + g_], l_[first + g_ + 8]},
        y_{} {
    const auto address = shared.C(chunk).ldmatrix_by_columns(first, 0);
#pragma unroll
    for (int n = 0; n < N; n += 16) ldmatrix(C_[n / 16], address.address(0, n));
  }

  /// y = e (C S)
  __device__ void inter_chunk() {
    const auto address = shared_.state(chunk_).ldmatrix_by_rows(0, 0);
#pragma unroll
    for (int n = 0; n < N; n += 16)
#pragma unroll
      for (int p = 0; p < P; p += 16) {
        unsigned S[4];  // two b (16 states x 8 channels), from p and p + 8 on
        ldmatrix(S, address.address(p, n));
        mma_m16n8k16(y_[p / 8], C_[n / 16], {S[0], S[1]});
        mma_m16n8k16(y_[p / 8 + 1], C_[n / 16], {S[2], S[3]});
      }
    const float e[2] = {exp2_approximate(l_row_[0]), exp2_approximate(l_row_[1])};
#pragma unroll
    for (int j = 0; j < P / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) y_[j][i] *= e[i / 2];
  }

  /// y += (K * C B^T * dt) u, by 32 columns of the matrix at a time: four sums run side by side.
  __device__ void intra_chunk() {
    const auto B_address = shared_.B(chunk_).ldmatrix_by_rows(0, 0);
    const auto u_address = shared_.u(chunk_).ldmatrix_by_columns(0, 0);
#pragma unroll 1
    for (int k = 0; k < first_ + 16; k += 32) {
      float M[4][4] = {};  // M[j]: c (16 tokens x 8 tokens before, from k + 8 j on)
      multiply_C_B(B_address, k, M);
      weigh(k, M);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // c of two neighbours, rounded to bf16, is a (16 tokens x 16 tokens before, from k + 16 half on).
        const unsigned a[4] = {pack_bf16(M[2 * half][0], M[2 * half][1]), pack_bf16(M[2 * half][2], M[2 * half][3]),
                               pack_bf16(M[2 * half + 1][0], M[2 * half + 1][1]),
                               pack_bf16(M[2 * half + 1][2], M[2 * half + 1][3])};
#pragma unroll
        for (int p = 0; p < P; p += 16) {
          unsigned u[4];  // two b (16 tokens before x 8 channels), from p and p + 8 on
          ldmatrix_transposed(u, u_address.address(k + 16 * half, p));
          mma_m16n8k16(y_[p / 8], a, {u[0], u[1]});
          mma_m16n8k16(y_[p / 8 + 1], a, {u[2], u[3]});
        }
      }
    }
  }

  /// Writes y + D u of `count` tokens of the chunk, from the chunk's first at `to` on, in whole pieces of 16 bytes: the
  /// warp gathers them where its rows of C were.
  __device__ void store(float D, int count, int channels, bf16* to, Index stride) const {
    __syncwarp();  // all lanes have their part of C
    const auto u_own = shared_.u(chunk_).in_tile(first_ + g_, 0) + 2 * t_;
    const auto y_own = shared_.C(chunk_).in_tile(first_ + g_, 0) + 2 * t_;
#pragma unroll
    for (int j = 0; j < P / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned u = *reinterpret_cast<const unsigned*>(u_own.address(8 * i, 8 * j));
        *reinterpret_cast<unsigned*>(y_own.address(8 * i, 8 * j)) = pack_bf16(
            y_[j][2 * i] + D * __uint_as_float(u << 16), y_[j][2 * i + 1] + D * __uint_as_float(u & 0xffff0000u));
      }
    __syncwarp();
    constexpr int pieces = P / 8;
    const int lane = threadIdx.x % 32, column = lane % pieces * 8;
#pragma unroll
    for (int row = lane / pieces; row < 16; row += 32 / pieces)
      if (first_ + row < count && column < channels)
        *reinterpret_cast<uint4*>(to + (first_ + row) * stride + column) =
            *reinterpret_cast<const uint4*>(shared_.C(chunk_).in_tile(first_ + row, column).address(0, 0));
  }

 private:
  static constexpr int N = Traits::N, P = Traits::P;

  /// M += C B^T, its columns k ... k + 31.
  __device__ void multiply_C_B(const SsdSwizzled<N>& address, int k, float (&M)[4][4]) const {
#pragma unroll
    for (int n = 0; n < N; n += 16)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        unsigned B[4];  // two b (16 states x 8 tokens), from k + 8 j and k + 8 j + 8 on
        ldmatrix(B, address.address(k + 8 * j, n));
        mma_m16n8k16(M[j], C_[n / 16], {B[0], B[1]});
        mma_m16n8k16(M[j + 1], C_[n / 16], {B[2], B[3]});
      }
  }

  /// M = K * M * dt of the same columns.
  __device__ void weigh(int k, float (&M)[4][4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = k + 8 * j + 2 * t_;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column + i % 2, row = first_ + g_ + i / 2 * 8;
        const float value = M[j][i] * (exp2_approximate(l_row_[i / 2] - l_[at]) * dt_[at]);
        M[j][i] = at <= row ? value : 0.0f;  // later ones may have overflowed
      }
    }
  }

  SsdShared<Traits> shared_;
  int chunk_, first_;
  int g_, t_;
  const float *dt_, *l_;   // of the chunk
  float l_row_[2];         // of the lane's tokens
  unsigned C_[N / 16][4];  // C_[i]: a (16 tokens x 16 states, from 16 i on)
  float y_[P / 8][4];      // y_[j]: c (16 tokens x 8 channels, from 8 j on)
};

/// The state warps of a block. state: of the rows' pasts, read before the first segment and rewritten after the last.
template <class Traits>
__device__ void ssd_state_warps(const SsdInputs<bf16, float>& in, const Sequences& sequences,
                                const SsdPart<Traits>& part, SsdShared<Traits> shared, const Tensor<float, 3>& state,
                                const Tensor<float, 3>& checkpoints, const SsdSegments& segments) {
  const int chunks = part.chunks();
  SsdLoader<Traits> loader(in, part, shared);
  loader.begin();
  SsdState<Traits> own;
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
    loader.wait_for(chunk);
    if (checkpoints) {
      const Index of_row = part.segment * Traits::segment + chunk;
      own.store(part, start, checkpoints[sequences.begin(part.row) / Traits::Q + part.row + of_row]);
    }
    own.advance(shared, chunk);
    if ((chunk + 1) % Traits::segment == 0) own.begin_segment(start);
    own.share(start, shared.state(chunk + 1));
  }
  if (state && part.ends_row()) own.store(part, start, state[part.row]);
}

/// The output warps of a block.
template <class Traits>
__device__ void ssd_output_warps(const SsdInputs<bf16, float>& in, const SsdPart<Traits>& part,
                                 SsdShared<Traits> shared, const Matrix<bf16>& y) {
  const int warp = threadIdx.x / 32, chunks = part.chunks();
  const float D = in.D[part.head];
  SsdDecay<Traits> decay(in, part, shared);
  if (warp == 0) {
    decay.load(0);
    decay.store(0);
  }
  bf16* to = &y(part.begin, part.channel);
  for (int chunk = 0; chunk < chunks; ++chunk, to += Traits::Q * y.stride[0]) {
    __syncthreads();
    // Later tokens take longer, so warps take turns; that of the first ones also computes the next chunk's decays.
    const int first = (warp + chunk) % Traits::output_warps * 16, count = part.count(chunk);
    if (first == 0) decay.load(chunk + 1);
    if (first < count) {
      SsdOutput<Traits> output(shared, chunk, first);
      output.inter_chunk();
      output.intra_chunk();
      output.store(D, count, part.channels, to, y.stride[0]);
    }
    if (first == 0) decay.store(chunk + 1);
  }
}

/// Rows of more than few_tokens. checkpoints, optional: the states before the chunks, as ssd() keeps them for Q.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    ssd_chunk_scan_kernel(SsdInputs<bf16, float> in, Sequences sequences, Tensor<float, 3> state, Matrix<bf16> y,
                          Tensor<float, 3> checkpoints, SsdSegments segments, Index few_tokens) {
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdPart<Traits> part(in, sequences, segments.count);
  if (part.of_row <= few_tokens || part.length == 0) return;
  // Warps go their own ways between the barriers of the block, one a chunk.
  if (threadIdx.x / 32 >= Traits::output_warps)
    ssd_state_warps(in, sequences, part, shared, state, checkpoints, segments);
  else
    ssd_output_warps(in, part, shared, y);
}

}  // namespace zamba::kernel
