// SPDX-License-Identifier: MIT
// The backward pass of attention on CUDA: probabilities are computed again, tile by tile, as FlashAttention-2 (Dao,
// arXiv 2307.08691) does; equations and shapes in ops/attention.hpp.
//
// First d_out . out of every query and head; then each gradient by blocks that own its rows and sum over all that they
// meet, in order: keys over the queries that see them, of one head of their group after the other, queries over keys.
// Scores are computed for either, and no sum is atomic.
//   backward_sm90.cuh    bf16 by warpgroups
//   backward_sm80.cuh    bf16 on tensor cores
//   backward_plain.cuh   any other type, or rows that do not start at multiples of 16 bytes
#pragma once

#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/attention/backward_plain.cuh>
#include <zamba/ops/attention/backward_sm80.cuh>
#include <zamba/ops/attention/backward_sm90.cuh>
#include <zamba/ops/attention/backward_tile.cuh>

namespace zamba::kernel {

template <class A_, int Width_>
struct AttentionSumsTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int width = Width_, threads = 256, warps = threads / 32;
};

/// sums (2, heads, tokens): lse, and d_out . out. A warp has one query of one head.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_sums_kernel(AttentionShape shape, Matrix<const typename Traits::A> d_out,
                          Matrix<const typename Traits::A> out, Matrix<const typename Traits::F> lse,
                          Tensor<typename Traits::F, 3> sums) {
  using F = typename Traits::F;
  constexpr int width = Traits::width;
  launch_dependents();
  grid_dependency_wait();
  const int lane = threadIdx.x % 32, head_dim = static_cast<int>(shape.head_dim);
  const Index step = Index{gridDim.x} * Traits::warps, count = d_out.rows() * shape.heads;
  for (Index i = Index{blockIdx.x} * Traits::warps + threadIdx.x / 32; i < count; i += step) {
    const Index token = i / shape.heads, head = i % shape.heads;
    F dot = 0;
    for (int d = lane * width; d < head_dim; d += 32 * width) {
      F dy[width], y[width];
      load_vector<width>(&d_out(token, head * head_dim + d)).unpack(dy);
      load_vector<width>(&out(token, head * head_dim + d)).unpack(y);
#pragma unroll
      for (int j = 0; j < width; ++j) dot += dy[j] * y[j];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
    if (lane != 0) continue;
    sums(0, head, token) = lse(token, head);
    sums(1, head, token) = dot;
  }
}

template <class A, class F>
void sum_attention_gradients(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> d_out,
                             Matrix<const A> out, Matrix<const F> lse, Tensor<F, 3> sums) {
  const auto with = [&]<class Traits>(Traits) {
    kernel::launch(ctx, overlap_for(d_out.rows()), "attention backward", attention_sums_kernel<Traits>,
                   blocks_for(d_out.rows() * shape.heads, Traits::warps), Traits::threads, 0, shape, d_out, out, lse,
                   sums);
  };
  constexpr int wide = vector_width<A>;
  if (shape.head_dim % wide == 0 && aligned(d_out, wide) && aligned(out, wide))
    with(AttentionSumsTraits<A, wide>{});
  else
    with(AttentionSumsTraits<A, 1>{});
}

/// All gradients, by the kernels that fit.
template <class A, class S>
void attention_gradients(Context<cuda>& ctx, const AttentionShape& shape, const AttentionBackwardTensors<A>& at,
                         const AttentionKeys<S>& source, const Sequences& sequences) {
  if constexpr (std::is_same_v<A, bf16> && std::is_same_v<S, bf16>)
    if (AttentionBackwardSm80::fit(ctx, shape, at, source)) {
      if (AttentionBackwardSm90::fit(ctx, shape, source))
        return AttentionBackwardSm90::launch(ctx, shape, at, source, sequences);
      return AttentionBackwardSm80::launch(ctx, shape, at, source, sequences);
    }
  PlainAttentionBackward::launch(ctx, shape, at, source, sequences);
}

}  // namespace zamba::kernel
