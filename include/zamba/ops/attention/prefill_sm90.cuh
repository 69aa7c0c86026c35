// SPDX-License-Identifier: MIT
// Prefill: attention of bf16 for rows of several tokens by warpgroups, as FlashAttention-3 (Shah et al., arXiv
// 2407.08608): wgmma, TMA, warps specialised as producer and consumers. Equations and shapes in ops/attention.hpp. It
// does what prefill_sm80.cuh does for every GPU with tensor cores, where the code is compiled for sm_90a and runs
// there.
//
// Producer warps load boxes of keys and of values by TMA into two rings of stages in shared memory; an mbarrier of each
// stage says that it is full, another that it was read. Consumer warpgroups compute. Two kernels:
//   prefill_sm90_narrow.cuh   narrow heads, of at most 256 dimensions: a consumer has 64 queries with all their
//                             dimensions in registers
//   prefill_sm90_wide.cuh     wide heads: one consumer computes scores and probabilities, two the sums
// A box that leaves the tensor is filled with zeros. What it holds of other rows of the batch, or of a cache beyond the
// last key, does not count: such scores are masked, such values set to zero.
//
// Numeric contract: that of prefill_sm80.cuh.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/prefill_sm90_narrow.cuh>
#include <zamba/ops/attention/prefill_sm90_wide.cuh>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Which of what PrefillSm80 takes these kernels do, and their launch. A is bf16; templates, as there.
class PrefillSm90 {
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
      const AttentionTensorMaps maps{tensor_map_of_heads(all_q, shape.head_dim, Traits::box_queries),
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
      check_cuda(cudaLaunchKernelEx(&config, kernel, maps, shape, q, keys, sequences, rows, out, lse), "attention");
    });
  }

 private:
  template <class F>
  static auto with_kernel(Index head_dim, F&& f) {
    const auto narrow = [&]<class Traits>(Traits traits) {
      return f(traits, attention_prefill_sm90_narrow_kernel<Traits>);
    };
    const auto wide = [&]<class Traits>(Traits traits) {
      return f(traits, attention_prefill_sm90_wide_kernel<Traits>);
    };
    if (head_dim <= 64) return narrow(PrefillSm90NarrowTraits<64, 128>{});
    if (head_dim <= 80) return narrow(PrefillSm90NarrowTraits<80, 128>{});
    if (head_dim <= 128) return narrow(PrefillSm90NarrowTraits<128, 128>{});
    if (head_dim <= 160) return narrow(PrefillSm90NarrowTraits<160, 96>{});
    if (head_dim <= 224) return narrow(PrefillSm90NarrowTraits<224, 64>{});
    if (head_dim <= 256) return narrow(PrefillSm90NarrowTraits<256, 64>{});
    if (head_dim <= 464) return wide(PrefillSm90WideTraits<464>{});
    return wide(PrefillSm90WideTraits<512>{});
  }
};

}  // namespace zamba::kernel
