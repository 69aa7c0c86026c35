// SPDX-License-Identifier: MIT
// attention of bf16 on tensor cores, for rows of several tokens; equations and shapes in ops/attention.hpp.
//
// A block takes one head and a tile of a row's queries, which stay in shared memory; keys and values pass by in a ring
// of stages, copied ahead of their use. Two kernels: attention_narrow.cuh for heads of at most 160 dimensions,
// attention_deep.cuh for wider ones. Rows in shared memory are an odd number of 16-byte pieces apart, so no two of a
// matrix's 8 rows meet in a bank. What lies beyond the head's dimensions or the last key is filled with zeros and never
// read.
//
// Numeric contract: scores, softmax and sums in float; probabilities, of exponentials relative to the greatest score so
// far, are rounded to bf16 before the second product, their total is not. Keys come in tiles counted from position 0
// and in one order, so a rerun is bit-equal and a row gives the same in any batch. The output is rounded once.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/prefill_sm80_narrow.cuh>
#include <zamba/ops/attention/prefill_sm80_wide.cuh>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// What fits these kernels, and their launch. A is bf16; templates, so that only what uses the kernels compiles
/// them.
class AttentionTiles {
 public:
  /// Otherwise: the greatest score is not that of the greatest product, rows do not start at multiples of 16 bytes, or
  /// the GPU has too little shared memory.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                  const AttentionKeys<A>& keys, Matrix<A> out) {
    constexpr Index piece = vector_width<bf16>;
    return shape.scale > 0 && shape.head_dim % piece == 0 && aligned(q, piece) && aligned(keys.k, piece) &&
           aligned(keys.v, piece) && aligned(out, piece) &&
           with_traits(shape.head_dim, []<class Traits>(Traits) { return Traits::shared_bytes; }) <= ctx.most_shared();
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q, const AttentionKeys<A>& keys,
                     const Sequences& sequences, const AttentionRows& rows, Matrix<A> out, Matrix<float> lse) {
    with_traits(shape.head_dim, [&]<class Traits>(Traits) {
      static_assert(Traits::shared_bytes <= 227 * 1024);
      const auto blocks = static_cast<unsigned>((sequences.tokens / Traits::queries + sequences.rows) * shape.heads);
      if constexpr (Traits::deep) {
        allow_shared(deep_attention_kernel<Traits>, Traits::shared_bytes, "attention");
        deep_attention_kernel<Traits><<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(
            shape, q, keys, sequences, rows, out, lse);
      } else {
        allow_shared(narrow_attention_kernel<Traits>, Traits::shared_bytes, "attention");
        narrow_attention_kernel<Traits><<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(
            shape, q, keys, sequences, rows, out, lse);
      }
      check_launch("attention");
    });
  }

 private:
  template <class F>
  static auto with_traits(Index head_dim, F&& f) {
    if (head_dim <= 64) return f(NarrowAttentionTraits<64, 64>{});
    if (head_dim <= 80) return f(NarrowAttentionTraits<80, 64>{});
    if (head_dim <= 128) return f(NarrowAttentionTraits<128, 64>{});
    if (head_dim <= 160) return f(NarrowAttentionTraits<160, 32>{});
    if (head_dim <= 224) return f(DeepAttentionTraits<4, 7, 112, 64, 4>{});
    if (head_dim <= 256) return f(DeepAttentionTraits<4, 8, 128, 64, 3>{});
    if (head_dim <= 480) return f(DeepAttentionTraits<2, 15, 128, 32, 4>{});
    return f(DeepAttentionTraits<2, 16, 128, 32, 4>{});
  }
};

}  // namespace zamba::kernel
