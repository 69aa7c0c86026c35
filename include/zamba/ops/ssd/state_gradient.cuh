// SPDX-License-Identifier: MIT
// The gradients of ssd's states in bf16, on tensor cores: state passing from a row's last chunk to its first. With g
// the gradient of the state after a chunk and e_t the decay from the chunk's beginning up to and with t,
//
//   g_before = e_last g + C^T (e dy)
//
// A block takes 32 channels of a head of one row, each of its warps 16 states of them, in registers, in float. It
// leaves every chunk's g in memory, rounded to bf16, since chunk_gradient.cuh has it as a factor of products only.
#pragma once

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/chunk_state.cuh>
#include <zamba/ops/ssd/tile.cuh>

namespace zamba::kernel {

/// States that a block has room for; what is not there is 0.
template <int N_>
struct SsdStateGradientTraits {
  static constexpr int N = N_, P = 32, Q = 64, segment = 8;
  static constexpr bool outputs = true;  // a block takes whole rows
  static constexpr int warps = N / 16, threads = 32 * warps, stages = 4;
};

/// The shared memory of a block: dy (Q, P) and C (Q, N) of some chunks, g (N, P), which warps gather to write whole
/// pieces of 16 bytes, and l (Q) of two chunks. turn: counts the chunks from the last.
template <class Traits>
struct SsdStateGradientShared {
  static constexpr int dy_size = Traits::Q * Traits::P, stage_size = dy_size + Traits::Q * Traits::N;
  static constexpr int tiles = Traits::stages * stage_size + Traits::N * Traits::P;
  static constexpr std::size_t bytes = tiles * sizeof(bf16) + 2 * Traits::Q * sizeof(float);

  bf16* memory;

  __device__ SsdSwizzled<Traits::P> dy(int turn) const { return {memory, turn % Traits::stages * stage_size}; }
  __device__ SsdSwizzled<Traits::N> C(int turn) const { return {memory, turn % Traits::stages * stage_size + dy_size}; }
  __device__ SsdSwizzled<Traits::P> g() const { return {memory, Traits::stages * stage_size}; }
  __device__ float* l(int turn) const { return reinterpret_cast<float*>(memory + tiles) + turn % 2 * Traits::Q; }
};

/// g of 16 states of the block's channels, as the fragment of a warp.
template <class Traits>
struct SsdStateGradient {
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q;
  using Shared = SsdStateGradientShared<Traits>;
  Fragment<1, P / 8> g;  // (16 states x P)
  int first;             // state

  __device__ SsdStateGradient() : g{}, first(static_cast<int>(threadIdx.x) / 32 * 16) {}

  /// f(element, n, channel) for those that are there.
  template <class F>
  __device__ void for_elements(const SsdPart<Traits>& part, F&& f) {
    g.for_each([&](float& x, int row, int column) {
      const int n = first + g.first_row() + row, p = g.first_column() + column;
      if (n < part.states && p < part.channels) f(x, n, part.channel + p);
    });
  }

  /// Writes g, rounded, to (N, D).
  __device__ void store(const SsdPart<Traits>& part, const Shared& shared, const Matrix<bf16>& to) {
    const auto own = shared.g().in_tile(first + g.first_row(), 0) + g.first_column();
#pragma unroll
    for (int j = 0; j < P / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<unsigned*>(own.address(8 * i, 8 * j)) = pack_bf16(g.at(i, 2 * j), g.at(i, 2 * j + 1));
    __syncwarp();
    constexpr int pieces = P / 8;
    const int lane = threadIdx.x % 32, column = lane % pieces * 8;
#pragma unroll
    for (int row = first + lane / pieces; row < first + 16; row += 32 / pieces)
      if (row < part.states && column < part.channels)
        *reinterpret_cast<uint4*>(&to(row, part.channel + column)) =
            *reinterpret_cast<const uint4*>(shared.g().in_tile(row, column).address(0, 0));
    __syncwarp();
  }

  /// g = 2^l_last g + C^T (e dy)
  __device__ void go_back(const Shared& shared, int turn) {
    const float* const l = shared.l(turn);
    const auto C_address = shared.C(turn).ldmatrix_by_rows(0, first);
    const auto dy_address = shared.dy(turn).ldmatrix_by_columns(0, 0);
    const float of_chunk = exp2_approximate(l[Q - 1]);
    g.for_each([&](float& x, int, int) { x *= of_chunk; });
#pragma unroll
    for (int k = 0; k < Q; k += 16) {
      unsigned C[4];  // a (16 states x 16 tokens from k on), transposed from (tokens, states)
      ldmatrix_transposed(C, C_address.address(k, 0));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = k + 8 * half + g.first_column();  // the lane's columns of a: tokens t, t + 1
        const float e0 = exp2_approximate(l[t]), e1 = exp2_approximate(l[t + 1]);
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          C[i] = pack_bf16(e0 * __uint_as_float(C[i] << 16), e1 * __uint_as_float(C[i] & 0xffff0000u));
      }
#pragma unroll
      for (int p = 0; p < P; p += 16) {
        unsigned dy[4];  // two b (16 tokens x 8 channels), from p and p + 8 on
        ldmatrix_transposed(dy, dy_address.address(k, p));
        mma_m16n8k16(g.tile(0, p / 8), C, {dy[0], dy[1]});
        mma_m16n8k16(g.tile(0, p / 8 + 1), C, {dy[2], dy[3]});
      }
    }
  }
};

/// after (kept states, N, D): g after each chunk. d_state, optional: as of ssd_backward. Blocks: parts of 32 channels,
/// heads, rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_state_gradient_kernel(Matrix<const bf16> d_y, SsdInputs<bf16, float> in, Sequences sequences,
                              Tensor<float, 3> d_state, Tensor<bf16, 3> after) {
  constexpr int Q = Traits::Q;
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdStateGradientShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdPart<Traits> part(in, sequences, 1);
  if (part.length == 0) return;
  const int chunks = part.chunks();
  const auto load = [&](int turn) {  // begins to; one group of copies, though there may be none
    if (turn < chunks) {
      const int chunk = chunks - 1 - turn, count = part.count(chunk);
      const Index first = part.begin + Index{chunk} * Q;
      ssd_copy_tile<Q, Traits::P, Traits::threads>(&d_y(first, part.channel), d_y.stride[0], count, part.channels,
                                                   shared.dy(turn), static_cast<int>(threadIdx.x));
      ssd_copy_tile<Q, Traits::N, Traits::threads>(&in.C(first, part.group, 0), in.C.stride[0], count, part.states,
                                                   shared.C(turn), static_cast<int>(threadIdx.x));
    }
    copy_async_commit();
  };
#pragma unroll
  for (int turn = 0; turn + 1 < Traits::stages; ++turn) load(turn);

  const bool decays = threadIdx.x < 32;  // the first warp also computes l, for the turn to come
  const float a = -::exp(in.A_log[part.head]) * log2_e, bias = in.dt_bias[part.head];
  float x[2];
  const auto load_steps = [&](int turn) {
    if (!decays || turn >= chunks) return;
    const int chunk = chunks - 1 - turn;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * static_cast<int>(threadIdx.x) + i;
      x[i] = t < part.count(chunk) ? float(in.delta(part.begin + Index{chunk} * Q + t, part.head)) + bias : 0.0f;
    }
  };
  const auto store_steps = [&](int turn) {
    if (!decays || turn >= chunks) return;
    const SsdSteps steps(x, part.count(chunks - 1 - turn), a, static_cast<float>(in.dt_min));
    *reinterpret_cast<float2*>(shared.l(turn) + 2 * threadIdx.x) = make_float2(steps.l[0], steps.l[1]);
  };
  load_steps(0);
  store_steps(0);
  SsdStateGradient<Traits> own;
  if (d_state) own.for_elements(part, [&](float& g, Index n, Index c) { g = d_state(part.row, n, c); });
  const Index slot = part.begin / Q + part.row;
  for (int turn = 0; turn < chunks; ++turn) {
    copy_async_wait<Traits::stages - 2>();
    __syncthreads();
    load(turn + Traits::stages - 1);
    load_steps(turn + 1);
    own.store(part, shared, after[slot + chunks - 1 - turn]);
    own.go_back(shared, turn);
    store_steps(turn + 1);
  }
  if (d_state) {  // a row that began from zero has no initial state to receive a gradient
    const bool continued = sequences.start(part.row) > 0;
    own.for_elements(part, [&](float g, Index n, Index c) { d_state(part.row, n, c) = continued ? g : 0.0f; });
  }
}

}  // namespace zamba::kernel
