// SPDX-License-Identifier: MIT
// attention of bf16 by warpgroups, for rows of several tokens; equations and shapes in ops/attention.hpp. It does what
// attention_tiles.cuh does for every GPU with tensor cores, where the code is compiled for sm_90a and runs there.
//
// Some threads only copy: boxes of keys and of values go through two rings of stages in shared memory; a barrier of
// each stage says that it is full, another that it was read. The other warpgroups compute. Two kernels:
//   whole heads   of at most 256 dimensions. A warpgroup holds 64 queries with all their dimensions in registers. It
//                 queues the products for the scores of a tile with those of the probabilities of the tile before, and
//                 the two warpgroups of a block take turns, so that one exponentiates while the other multiplies.
//   split heads   of more, 64 queries a block. One warpgroup computes scores and probabilities, which pass through
//                 shared memory to two that hold the sums: 256 dimensions the first, the rest the second. Two blocks of
//                 neighbouring queries are a cluster: each copies half of every stage, to both.
// A box that leaves the tensor is filled with zeros. What it holds of other rows of the batch, or of a cache beyond the
// last key, does not count: such scores are masked, such values set to zero.
//
// Numeric contract: that of attention_tiles.cuh.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/prefill_sm90_narrow.cuh>
#include <zamba/ops/attention/prefill_sm90_wide.cuh>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Which of what AttentionTiles takes goes to warpgroups, and their launch. A is bf16; templates, as there.
class AttentionWarpgroups {
 public:
  /// Whether what this GPU runs of the program was compiled for warpgroups.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, const AttentionKeys<A>&) {
    return with_kernel(shape.head_dim, [&]<class Traits>(Traits, auto* kernel) {
      // CUDA says it of the code that it chose: only where warpgroups are does a kernel declare shared memory.
      cudaFuncAttributes compiled{};
      check_cuda(cudaFuncGetAttributes(&compiled, kernel), "attention");
      return compiled.sharedSizeBytes > 0 && compiled.sharedSizeBytes + Traits::shared_bytes <= ctx.most_shared();
    });
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q, const AttentionKeys<A>& keys,
                     const Sequences& sequences, const AttentionRows& rows, Matrix<A> out, Matrix<float> lse) {
    with_kernel(shape.head_dim, [&]<class Traits>(Traits, auto* kernel) {
      Tensor<const A, 3> all_q(q.data, 1, q.rows(), q.cols());
      all_q.stride[1] = q.stride[0];
      const AttentionBoxes boxes{tensor_map_of_heads(all_q, shape.head_dim, Traits::box_queries),
                                 tensor_map_of_heads(keys.k, shape.head_dim, Traits::box_keys),
                                 tensor_map_of_heads(keys.v, shape.head_dim, Traits::box_values)};
      const Index tiles = (sequences.tokens / Traits::queries + sequences.rows) * shape.heads;
      allow_shared(kernel, Traits::shared_bytes, "attention");
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {Traits::cluster, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(tiles * Traits::cluster);
      config.blockDim = Traits::threads;
      config.dynamicSmemBytes = Traits::shared_bytes;
      config.stream = ctx.stream();
      config.attrs = &cluster;
      config.numAttrs = 1;
      check_cuda(cudaLaunchKernelEx(&config, kernel, boxes, shape, q, keys, sequences, rows, out, lse), "attention");
    });
  }

 private:
  template <class F>
  static auto with_kernel(Index head_dim, F&& f) {
    const auto whole = [&]<class Traits>(Traits traits) { return f(traits, whole_head_attention_kernel<Traits>); };
    const auto split = [&]<class Traits>(Traits traits) { return f(traits, split_head_attention_kernel<Traits>); };
    if (head_dim <= 64) return whole(WholeHeadTraits<64, 128>{});
    if (head_dim <= 80) return whole(WholeHeadTraits<80, 128>{});
    if (head_dim <= 128) return whole(WholeHeadTraits<128, 128>{});
    if (head_dim <= 160) return whole(WholeHeadTraits<160, 96>{});
    if (head_dim <= 224) return whole(WholeHeadTraits<224, 64>{});
    if (head_dim <= 256) return whole(WholeHeadTraits<256, 64>{});
    if (head_dim <= 464) return split(SplitHeadTraits<464>{});
    return split(SplitHeadTraits<512>{});
  }
};

}  // namespace zamba::kernel
