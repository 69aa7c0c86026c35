// SPDX-License-Identifier: MIT
// The backward pass of attention of bf16 by warpgroups, as FlashAttention-3 (Shah et al., arXiv 2407.08608) but in two
// kernels, seven products and no atomics: wgmma, TMA, warps specialised as producer and consumers. Equations in
// ops/attention.hpp.
//
//   backward_sm90_pairs.cuh     d_k and d_v: a block owns keys, queries pass (backward_sm90_passing.cuh); d_q of wide heads
//   backward_sm90_queries.cuh   d_q of narrow heads: a block owns queries, keys pass
//
// The rows of all scores are those of the sums, so P and dS go from one product to the next in registers. A box that
// leaves the tensor is filled with zeros. What it holds of other rows of the batch, or of a cache beyond the last key,
// does not count: such P and dS are zero, and so are, before the sums, such rows of what passes.
//
// Numeric contract: that of backward_sm80.cuh; dS is of P rounded to 11 bits where warpgroups share the pairs.
#pragma once

#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/attention/backward_sm90_pairs.cuh>
#include <zamba/ops/attention/backward_sm90_queries.cuh>
#include <zamba/ops/attention/backward_tile.cuh>

namespace zamba::kernel {

/// Which of what AttentionBackwardSm80 takes these kernels do, and their launch. A is bf16; templates, as there.
class AttentionBackwardSm90 {
 public:
  /// Whether what this GPU runs of the program was compiled for warpgroups.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, const AttentionKeys<A>&) {
    bool all = true;
    for_kernels(shape.head_dim, [&]<class Traits>(Traits, auto* kernel) {
      // As PrefillSm90::fit() has it.
      cudaFuncAttributes compiled{};
      check_cuda(cudaFuncGetAttributes(&compiled, kernel), "attention backward");
      all = all && compiled.sharedSizeBytes > 0 && compiled.sharedSizeBytes + Traits::shared_bytes <= ctx.most_shared();
    });
    return all;
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, const AttentionBackwardTensors<A>& at,
                     const AttentionKeys<A>& source, const Sequences& sequences) {
    const auto all = [](Matrix<const A> m) {
      Tensor<const A, 3> all(m.data, 1, m.rows(), m.cols());
      all.stride[1] = m.stride[0];
      return all;
    };
    for_kernels(shape.head_dim, [&]<class Traits>(Traits, auto* kernel) {
      const auto map = [&](Tensor<const A, 3> of, Index positions) {
        return tensor_map_of_heads(of, shape.head_dim, positions);
      };
      const Index for_queries = Traits::owns_queries ? Traits::rows : Traits::columns;
      const Index for_keys = Traits::owns_queries ? Traits::columns : Traits::rows;
      const CUtensorMap q = map(all(at.q), for_queries), d_out = map(all(at.d_out), for_queries);
      const CUtensorMap k = map(source.k, for_keys), v = map(source.v, for_keys);
      const AttentionBackwardMaps maps =
          Traits::owns_queries ? AttentionBackwardMaps{{q, d_out}, {k, v}} : AttentionBackwardMaps{{k, v}, {q, d_out}};
      const Index tiles = Traits::owns_queries ? (sequences.tokens / Traits::rows + sequences.rows) * shape.heads
                                               : Index{KeyTile<Traits::rows>::blocks(shape, source, sequences)};
      allow_shared(kernel, Traits::shared_bytes, "attention backward");
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {Traits::blocks, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(tiles * Traits::blocks);
      config.blockDim = Traits::threads;
      config.dynamicSmemBytes = Traits::shared_bytes;
      config.stream = ctx.stream();
      config.attrs = &cluster;
      config.numAttrs = 1;
      check_cuda(cudaLaunchKernelEx(&config, kernel, maps, shape, at, source, sequences), "attention backward");
    });
  }

 private:
  /// The kernels of all gradients, one after the other.
  template <class F>
  static void for_kernels(Index head_dim, F&& f) {
    const auto pairs = [&]<class Traits>(Traits traits) { f(traits, attention_backward_sm90_pairs_kernel<Traits>); };
    const auto queries = [&]<class Traits>(Traits traits) {
      f(traits, attention_backward_sm90_queries_kernel<Traits>);
    };
    const auto narrow = [&]<class Keys, class Queries>(Keys of_keys, Queries of_queries) {
      pairs(of_keys);
      queries(of_queries);
    };
    const auto wide = [&]<int Dims>(std::integral_constant<int, Dims>) {
      pairs(AttentionPairTraits<false, Dims, 48, 3, 2, 2>{});
      pairs(AttentionPairTraits<true, Dims, 48, 3, 2, 2>{});
    };
    if (head_dim <= 64)
      narrow(AttentionPairTraits<false, 64, 64, 4, 4>{}, QueryGradientSm90Traits<64, 64, 2>{});
    else if (head_dim <= 128)
      narrow(AttentionPairTraits<false, 128, 64, 4, 4>{}, QueryGradientSm90Traits<128, 64, 2>{});
    else if (head_dim <= 160)
      narrow(AttentionPairTraits<false, 160, 64, 3, 3>{}, QueryGradientSm90Traits<160, 64, 2>{});
    else if (head_dim <= 224)
      narrow(AttentionPairTraits<false, 224, 48, 3, 3>{}, QueryGradientSm90Traits<224, 48, 1>{});
    else if (head_dim <= 256)
      narrow(AttentionPairTraits<false, 256, 48, 3, 3>{}, QueryGradientSm90Traits<256, 48, 1>{});
    else if (head_dim <= 480)
      wide(std::integral_constant<int, 240>{});
    else
      wide(std::integral_constant<int, 256>{});
  }
};

}  // namespace zamba::kernel
