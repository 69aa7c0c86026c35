// SPDX-License-Identifier: MIT
// The backward pass of attention of bf16 by warpgroups, as FlashAttention-3 (Shah et al., arXiv 2407.08608) but in two
// kernels, seven products and no atomics: wgmma, TMA, warps specialised as producer and consumers. Equations in
// ops/attention.hpp.
//
//   backward_sm90_rows.cuh      d_q, and d_k and d_v of narrow heads: warpgroups with rows of their own
//   backward_sm90_pairs.cuh     d_k and d_v, and d_q of wide heads: two warpgroups share the pairs of rows and columns
//   backward_sm90_passing.cuh   what both own and load
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
#include <zamba/ops/attention/backward_sm90_rows.cuh>
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
    const auto rows = [&]<class Traits>(Traits traits) { f(traits, attention_backward_sm90_rows_kernel<Traits>); };
    const auto pairs = [&]<class Traits>(Traits traits) { f(traits, attention_backward_sm90_pairs_kernel<Traits>); };
    if (head_dim <= 64) {
      rows(AttentionRowTraits<false, 64, 64, 3, 3>{});
      rows(AttentionRowTraits<true, 64, 96, 3, 2>{});
    } else if (head_dim <= 128) {
      rows(AttentionRowTraits<false, 128, 48, 3, 3>{});
      rows(AttentionRowTraits<true, 128, 64, 3, 2>{});
    } else if (head_dim <= 160) {
      pairs(AttentionPairTraits<false, 160, 64, 3, 3>{});
      rows(AttentionRowTraits<true, 160, 64, 3, 2>{});
    } else if (head_dim <= 224) {
      pairs(AttentionPairTraits<false, 224, 48, 3, 3>{});
      rows(AttentionRowTraits<true, 224, 64, 2, 1>{});
    } else if (head_dim <= 256) {
      pairs(AttentionPairTraits<false, 256, 48, 3, 3>{});
      rows(AttentionRowTraits<true, 256, 64, 2, 1>{});
    } else if (head_dim <= 480) {
      pairs(AttentionPairTraits<false, 240, 48, 3, 2, 2>{});
      pairs(AttentionPairTraits<true, 240, 48, 3, 2, 2>{});
    } else {
      pairs(AttentionPairTraits<false, 256, 48, 3, 2, 2>{});
      pairs(AttentionPairTraits<true, 256, 48, 3, 2, 2>{});
    }
  }
};

}  // namespace zamba::kernel
