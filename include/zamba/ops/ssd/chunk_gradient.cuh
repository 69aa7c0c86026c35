// SPDX-License-Identifier: MIT
// The gradients of ssd's inputs in bf16, chunk by chunk, as products on tensor cores; equations in backward.hpp, that
// of the decays in backward.cuh. Before it, state_gradient.cuh has left g, the gradient of the state after each chunk.
//
// A block takes one chunk of 64 tokens and some heads of a group, one after the other, so that C B^T is computed once,
// and dB, dC and d(C B^T) are summed over the heads in registers. Rows of all three belong to warps, 16 each:
//
//   four warps   gradients of u, D and delta: rows of B C^T and its gradient, so that what weighs dy below is the first
//                operand as it stands in registers
//                  du     = dt f (B g) + (dt M + D)^T dy          M^T = K^T * B C^T; D on the diagonal
//                  d_CB^T = sum over heads of K^T * (v dy^T)
//   four warps   gradients of B and C, through the states at both ends of the chunk
//                  dC     = sum over heads of (e dy) s^T          + d_CB B       when all heads are done
//                  dB     = sum over heads of (f v) g^T           + d_CB^T C
//
// While a head is computed, cp.async brings u, dy, g and s of the next; s, which is kept in float, the second four
// warps round for their products. What belongs to tokens of a head, sums over its channels and states, waits in shared
// memory for the end, when a warp finishes a head.
//
// Numeric contract: as of chunk_scan.cuh; factors of products that are rounded to bf16 are g, s, dt M + D and, after
// the sum over heads, d_CB. What is not summed on tensor cores is in float, the weights M (dy v^T) too.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/backward.cuh>
#include <zamba/ops/ssd/chunk_state.cuh>
#include <zamba/ops/ssd/gradient_products.cuh>
#include <zamba/ops/ssd/gradient_tile.cuh>

namespace zamba::kernel {

/// The gradients of delta of a head, and of its parameters in this chunk, by a warp: a lane has tokens 2 lane and
/// 2 lane + 1.
template <class Traits>
__device__ void ssd_finish_head(const SsdInputs<bf16, float>& in, const SsdGradients<bf16, float>& out,
                                const SsdGradientPart<Traits>& part, const SsdTokens& of, Index head,
                                const Tensor<float, 3>& parameters) {
  const int lane = threadIdx.x % 32;
  const float a = -::exp(in.A_log[head]);
  float span[2], after[2], through_g[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    span[i] = of.through_s[t];
    for (int warp = 0; warp < Traits::warps; ++warp) span[i] += of.within[warp][t];
    through_g[i] = of.through_g[t];
  }
  float later = span[0] + span[1], before = through_g[0] + through_g[1];  // of the lanes from, and up to, this one
  for (int distance = 1; distance < 32; distance *= 2) {
    const float more = __shfl_down_sync(0xffffffffu, later, distance);
    const float less = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane + distance < 32) later += more;
    if (lane >= distance) before += less;
  }
  later = __shfl_down_sync(0xffffffffu, later, 1);
  before = __shfl_up_sync(0xffffffffu, before, 1);
  if (lane == 31) later = 0;
  if (lane == 0) before = 0;
  float states = 0;
  for (int warp = 0; warp < Traits::warps; ++warp) states += of.states[warp];
  const float passing = exp2_approximate(of.l[Traits::Q - 1]) * states;
  after[1] = passing + (later + span[1]) + (before + through_g[0]);
  after[0] = passing + (later + span[1] + span[0]) + before;

  float sums[3] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    if (t >= part.count) continue;
    const float x = float(in.delta(part.first + t, head)) + in.dt_bias[head];
    const float slope = x > 20 ? 1.0f : 1 / (1 + ::exp(-x)), d_dt = a * after[i] + of.d_v_u[t];
    const float d_delta = of.dt[t] > static_cast<float>(in.dt_min) ? d_dt * slope : 0.0f;
    out.delta(part.first + t, head) = bf16(d_delta);
    sums[0] += a * after[i] * of.dt[t];
    sums[1] += of.d_y_u[t];
    sums[2] += d_delta;
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
    if (lane == 0) parameters(i, head, part.slot) = sums[i];
  }
}

/// The first four warps of a block.
template <class Traits>
__device__ void ssd_input_warps(const SsdInputs<bf16, float>& in, const SsdGradients<bf16, float>& out,
                                const SsdGradientPart<Traits>& part, const SsdGradientShared<Traits>& shared,
                                const SsdGradientLoader<Traits>& loader, const Tensor<float, 3>& parameters) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  SsdInputGradient<Traits> own(shared, warp * 16);
  for (SsdTurn<Traits> turn(part.block), next = turn; turn; turn.next()) {
    copy_async_wait<0>();
    __syncthreads();
    next.next();
    loader.load(next);
    own.differentiate(turn.number, shared.of_head(turn.head), in.D[part.block.head + turn.head]);
    own.store(part.count, turn.channels(), &out.u(part.first, turn.first()), out.u.stride[0]);
  }
  __syncwarp();  // the last gradient of u has been written
  own.share();
  __syncthreads();
  for (Index number = warp; number < part.block.heads; number += Traits::warps)
    ssd_finish_head(in, out, part, shared.of_head(number), part.block.head + number, parameters);
}

/// The other four.
template <class Traits>
__device__ void ssd_projection_warps(const SsdGradientPart<Traits>& part, const SsdGradientShared<Traits>& shared,
                                     const SsdGradientLoader<Traits>& loader, const Matrix<float>& d_BC) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - Traits::warps;
  SsdProjectionGradient<Traits> own(shared, warp * 16);
  for (SsdTurn<Traits> turn(part.block), next = turn; turn; turn.next()) {
    copy_async_wait<0>();
    __syncthreads();
    next.next();
    loader.load(next);
    SsdTokens& of = shared.of_head(turn.head);
    float product = loader.round_state(turn.number);
    loader.load_state(next);
    for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(0xffffffffu, product, distance);
    if (threadIdx.x % 32 == 0) of.states[warp] += product;
    named_barrier_sync(1, Traits::threads / 2);  // s is rounded
    own.differentiate(turn.number, of);
  }
  __syncthreads();
  own.within_chunk();
  own.store(part.count, part.states, d_BC.slice(part.first, part.count));
}

/// before, after (kept states, N, D): the states before the chunks, the gradients of those after them. Blocks: of
/// heads, then slots of kept states.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_chunk_gradient_kernel(Matrix<const bf16> d_y, SsdInputs<bf16, float> in, Sequences sequences,
                              Tensor<const float, 3> before, Tensor<const bf16, 3> after, SsdGradients<bf16, float> out,
                              SsdBlocks blocks, SsdGradientParts<float> parts) {
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdGradientShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdGradientPart<Traits> part(sequences, blocks);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (part.count == 0) {
    for (int i = threadIdx.x; i < 3 * part.block.heads; i += Traits::threads)
      parts.parameters(i % 3, part.block.head + i / 3, part.slot) = 0;
    return;
  }
  const SsdGradientLoader<Traits> loader(in, d_y, before, after, part, shared);
  loader.load(SsdTurn<Traits>(part.block));
  const bool of_inputs = warp < Traits::warps;
  if (!of_inputs) loader.load_state(SsdTurn<Traits>(part.block));
  for (Index number = warp; number < part.block.heads; number += 2 * Traits::warps) {
    const Index head = part.block.head + number;
    SsdTokens& of = shared.of_head(number);
    for (int i = lane; i < static_cast<int>(sizeof(SsdTokens) / sizeof(float)); i += 32)
      reinterpret_cast<float*>(&of)[i] = 0;
    __syncwarp();
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane + i;
      x[i] = t < part.count ? float(in.delta(part.first + t, head)) + in.dt_bias[head] : 0.0f;
    }
    SsdSteps(x, part.count, -::exp(in.A_log[head]) * log2_e, static_cast<float>(in.dt_min)).store(of.dt, of.l);
  }
  copy_async_wait<0>();
  __syncthreads();
  // Warps go their own ways between the barriers of the block, one a turn and one at the end.
  if (of_inputs)
    ssd_input_warps(in, out, part, shared, loader, parts.parameters);
  else
    ssd_projection_warps(part, shared, loader, parts.BC[part.of_heads]);
}

}  // namespace zamba::kernel
