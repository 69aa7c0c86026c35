// SPDX-License-Identifier: MIT
// The backward pass of attention of bf16 by warpgroups, as FlashAttention-3 (Shah et al., arXiv 2407.08608) but in two
// kernels, seven products and no atomics: wgmma, TMA, warps specialised as producer and consumers. Equations in
// ops/attention.hpp.
//
//   backward_sm90_keys.cuh      d_k and d_v: a block owns keys, queries pass
//   backward_sm90_queries.cuh   d_q: a block owns queries, keys pass
//
// The rows of all scores are those of the sums, so P and dS go from one product to the next in registers. A box that
// leaves the tensor is filled with zeros. What it holds of other rows of the batch, or of a cache beyond the last key,
// does not count: such P and dS are zero, and so are, before the sums, such rows of what passes.
//
// Numeric contract: that of backward_sm80.cuh; but dS is of P as it was rounded where d_k is concerned.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/attention/backward_sm90_keys.cuh>
#include <zamba/ops/attention/backward_sm90_queries.cuh>
#include <zamba/ops/attention/backward_tile.cuh>

namespace zamba::kernel {

/// Which of what AttentionBackwardSm80 takes these kernels do, and their launch. A is bf16; templates, as there.
class AttentionBackwardSm90 {
 public:
  /// Whether what this GPU runs of the program was compiled for warpgroups, and the head is of at most 256 dimensions.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, const AttentionKeys<A>&) {
    if (shape.head_dim > 256) return false;
    return with_kernels(shape.head_dim, [&]<class Keys, class Queries>(Keys, auto* keys, Queries, auto* queries) {
      // As PrefillSm90::fit() has it.
      const auto fits = [&](auto* kernel, std::size_t bytes) {
        cudaFuncAttributes compiled{};
        check_cuda(cudaFuncGetAttributes(&compiled, kernel), "attention backward");
        return compiled.sharedSizeBytes > 0 && compiled.sharedSizeBytes + bytes <= ctx.most_shared();
      };
      return fits(keys, Keys::shared_bytes) && fits(queries, Queries::shared_bytes);
    });
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, const AttentionBackwardTensors<A>& at,
                     const AttentionKeys<A>& source, const Sequences& sequences) {
    const auto map = [&](Tensor<const A, 3> of, Index positions) {
      return tensor_map_of_heads(of, shape.head_dim, positions);
    };
    const auto all = [](Matrix<const A> m) {
      Tensor<const A, 3> all(m.data, 1, m.rows(), m.cols());
      all.stride[1] = m.stride[0];
      return all;
    };
    const auto run = [&]<class Traits>(Traits, auto* kernel, Index blocks, const AttentionBackwardMaps& maps) {
      allow_shared(kernel, Traits::shared_bytes, "attention backward");
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(blocks);
      config.blockDim = Traits::threads;
      config.dynamicSmemBytes = Traits::shared_bytes;
      config.stream = ctx.stream();
      check_cuda(cudaLaunchKernelEx(&config, kernel, maps, shape, at, source, sequences), "attention backward");
    };
    with_kernels(
        shape.head_dim, [&]<class Keys, class Queries>(Keys of_keys, auto* keys, Queries of_queries, auto* queries) {
          const AttentionBackwardMaps maps{{map(source.k, Keys::keys), map(source.v, Keys::keys)},
                                           {map(all(at.q), Keys::queries), map(all(at.d_out), Keys::queries)}};
          run(of_keys, keys, Keys::Tile::blocks(shape, source, sequences), maps);
          const AttentionBackwardMaps others{{map(all(at.q), Queries::queries), map(all(at.d_out), Queries::queries)},
                                             {map(source.k, Queries::keys), map(source.v, Queries::keys)}};
          run(of_queries, queries, (sequences.tokens / Queries::queries + sequences.rows) * shape.heads, others);
        });
  }

 private:
  template <class F>
  static auto with_kernels(Index head_dim, F&& f) {
    const auto with = [&]<class Keys, class Queries>(Keys of_keys, Queries of_queries) {
      return f(of_keys, attention_backward_sm90_keys_kernel<Keys>, of_queries,
               attention_backward_sm90_queries_kernel<Queries>);
    };
    if (head_dim <= 64) return with(KeyGradientSm90Traits<64, 64, 4>{}, QueryGradientSm90Traits<64, 64, 2>{});
    if (head_dim <= 128) return with(KeyGradientSm90Traits<128, 64, 4>{}, QueryGradientSm90Traits<128, 64, 2>{});
    if (head_dim <= 160) return with(KeyGradientSm90Traits<160, 64, 3>{}, QueryGradientSm90Traits<160, 64, 2>{});
    if (head_dim <= 224) return with(KeyGradientSm90Traits<224, 48, 3>{}, QueryGradientSm90Traits<224, 48, 1>{});
    return with(KeyGradientSm90Traits<256, 48, 3>{}, QueryGradientSm90Traits<256, 48, 1>{});
  }
};

}  // namespace zamba::kernel
