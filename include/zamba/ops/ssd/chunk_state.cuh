// SPDX-License-Identifier: MIT
// The state of ssd's chunk scan, and the decays of a chunk's tokens. In the words of Mamba-2's kernels: chunk cumsum
// (SsdDecay), chunk state, and within a segment the passing of states from chunk to chunk (SsdState).
//
//   dt_t, l_t = sum_{j <= t} dt_j A log2(e)            l_t is log2 e_t, from the chunk's beginning
//   S^T       = 2^l_last S^T + (f dt u)^T B            f_t = 2^(l_last - l_t)
//
// l_t is a sum, not a product of decays: a step's decay below 2^-128 counts as 2^-128, of which exp2_approximate makes
// 0, so |l| is at most 2^13, and differences of two are good to 2^-10.
#pragma once

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd/tile.cuh>

namespace zamba::kernel {

/// dt and l of a chunk's tokens, by a warp: a lane has tokens 2 lane and 2 lane + 1.
struct SsdSteps {
  float dt[2], l[2];

  /// x: delta + bias. a: in powers of 2. A token that is not there has dt 0 and a decay of 1.
  __device__ SsdSteps(const float (&x)[2], int count, float a, float least) {
    const int lane = threadIdx.x % 32;
    float step[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = 2 * lane + i < count;
      dt[i] = there ? ::max(least, x[i] > 20 ? x[i] : ::log1p(::exp(x[i]))) : 0.0f;
      step[i] = there ? ::max(dt[i] * a, -128.0f) : 0.0f;
    }
    float sum = step[0] + step[1];  // of the lanes up to this one, by doubling distances
    for (int distance = 1; distance < 32; distance *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += before;
    }
    float before = __shfl_up_sync(0xffffffffu, sum, 1);
    if (lane == 0) before = 0;
    l[0] = before + step[0];
    l[1] = sum;
  }

  __device__ void store(float* all_dt, float* all_l) const {
    const int at = threadIdx.x % 32 * 2;
    *reinterpret_cast<float2*>(all_dt + at) = make_float2(dt[0], dt[1]);
    *reinterpret_cast<float2*>(all_l + at) = make_float2(l[0], l[1]);
  }
};

/// dt and l of chunks, one warp for each chunk; a lane has two neighbouring tokens.
template <class Traits>
class SsdDecay {
 public:
  __device__ SsdDecay(const SsdInputs<bf16, float>& in, const SsdPart<Traits>& part, SsdShared<Traits> shared)
      : in_(in),
        part_(part),
        shared_(shared),
        lane_(threadIdx.x % 32),
        a_(-::exp(in.A_log[part.head]) * log2_e),
        bias_(in.dt_bias[part.head]),
        least_(static_cast<float>(in.dt_min)) {}

  /// Begins to read a chunk's delta, of which store() makes dt and l.
  __device__ void load(int chunk) {
    const int count = part_.count(chunk);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane_ + i;
      delta_[i] = t < count ? float(in_.delta(part_.begin + Index{chunk} * Traits::Q + t, part_.head)) : 0.0f;
    }
  }

  /// dt and l of the chunk that was loaded.
  __device__ void store(int chunk) const {
    const float x[2] = {delta_[0] + bias_, delta_[1] + bias_};
    SsdSteps(x, part_.count(chunk), a_, least_).store(shared_.dt(chunk), shared_.l(chunk));
  }

 private:
  const SsdInputs<bf16, float>& in_;
  const SsdPart<Traits>& part_;
  SsdShared<Traits> shared_;
  int lane_;
  float a_, bias_, least_;  // a: in powers of 2
  float delta_[2] = {};
};

/// S^T of 16 channels, all n, as the fragment of a state warp. It is kept as two: what the segment has made of 0, and
/// `start`, the state before the segment, which decays: S = s + 2^decay start.
template <class Traits>
struct SsdState {
  static constexpr int pieces = Traits::N / 8, threads = 32 * Traits::state_warps;
  Fragment<1, pieces> s;  // (16 channels x N)
  float decay;            // of the segment up to here, its logarithm
  int lane, first;        // channel of the block's
  int thread;             // of those that keep the state

  __device__ SsdState() : s{}, decay(0), lane(threadIdx.x % 32), thread(threadIdx.x - 32 * Traits::output_warps) {
    first = thread / 32 * 16;
  }

  /// Tile j of a thread's s in an array of P N floats.
  __device__ float4& piece(float* of, int j) const { return reinterpret_cast<float4*>(of)[j * threads + thread]; }

  /// Tile j of the state here. left: 2^decay.
  __device__ float4 whole(float* start, float left, int j) const {
    const float4 before = piece(start, j);
    return make_float4(::fmaf(left, before.x, s.at(0, 2 * j)), ::fmaf(left, before.y, s.at(0, 2 * j + 1)),
                       ::fmaf(left, before.z, s.at(1, 2 * j)), ::fmaf(left, before.w, s.at(1, 2 * j + 1)));
  }

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
      piece(start, j) = whole(start, left, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) s.tile(0, j)[i] = 0;
    }
    decay = 0;
  }

  /// Writes the state here to (N, D).
  __device__ void store(const SsdPart<Traits>& part, const float* start, const Matrix<float>& to) const {
    const float left = exp2_approximate(decay);
    for_elements(part, [&](int at, Index n, Index c) {
      to(n, c) = ::fmaf(left, start[at], s.sums[at / 4 / threads * 4 + at % 4]);
    });
  }

  /// Writes the state here, as bf16, for the output warps.
  __device__ void share(float* start, SsdSwizzled<Traits::N> state) const {
    const float left = exp2_approximate(decay);
    const auto to = state.in_tile(first + lane / 4, 0) + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      const float4 S = whole(start, left, j);
      *reinterpret_cast<unsigned*>(to.address(0, 8 * j)) = pack_bf16(S.x, S.y);
      *reinterpret_cast<unsigned*>(to.address(8, 8 * j)) = pack_bf16(S.z, S.w);
    }
  }

  /// Over a chunk: s = 2^l_last s + (f dt u)^T B.
  __device__ void advance(SsdShared<Traits> shared, int chunk) {
    const float *const dt = shared.dt(chunk), *const l = shared.l(chunk);
    const auto u_address = shared.u(chunk).ldmatrix_by_rows(0, first);
    const auto B_address = shared.B(chunk).ldmatrix_by_columns(0, 0);
    const float last = l[Traits::Q - 1], of_chunk = exp2_approximate(last);
    decay += last;
    s.for_each([&](float& x, int, int) { x *= of_chunk; });
#pragma unroll
    for (int k = 0; k < Traits::Q; k += 16) {
      unsigned u[4];  // a (16 channels x 16 tokens from k on), transposed from (tokens, channels)
      ldmatrix_transposed(u, u_address.address(k, 0));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = k + 8 * half + 2 * (lane % 4);  // the lane's columns of a: tokens t, t + 1
        const float f0 = exp2_approximate(last - l[t]) * dt[t], f1 = exp2_approximate(last - l[t + 1]) * dt[t + 1];
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          u[i] = pack_bf16(f0 * __uint_as_float(u[i] << 16), f1 * __uint_as_float(u[i] & 0xffff0000u));
      }
#pragma unroll
      for (int n = 0; n < Traits::N; n += 16) {
        unsigned B[4];  // two b (16 tokens x 8 states), from n and n + 8 on
        ldmatrix_transposed(B, B_address.address(k, n));
        mma_m16n8k16(s.tile(0, n / 8), u, {B[0], B[1]});
        mma_m16n8k16(s.tile(0, n / 8 + 1), u, {B[2], B[3]});
      }
    }
  }
};

}  // namespace zamba::kernel
