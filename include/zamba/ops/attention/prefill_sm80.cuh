// SPDX-License-Identifier: MIT
// Prefill: attention of bf16 for rows of several tokens on tensor cores, as FlashAttention-2 (Dao, arXiv 2307.08691);
// equations and shapes in ops/attention.hpp.
//
// A block takes one head and a tile of a row's queries, which stay in shared memory; keys and values pass by in a ring
// of stages, copied ahead of their use by cp.async. For each tile of keys, with an online softmax
// (kernel/fragment.cuh):
//   S = Q K^T,   m' = max(m, row_max(S)),   P = exp2(scale (S - m')),   O = O * exp2(scale (m - m')) + P V
// Two kernels: prefill_sm80_narrow.cuh for narrow heads, of at most 160 dimensions, prefill_sm80_wide.cuh for wide
// ones. Rows in shared memory are an odd number of 16-byte pieces apart, so no two of a matrix's 8 rows meet in a bank.
// What lies beyond the head's dimensions or the last key is filled with zeros and never read.
//
// Numeric contract: scores, softmax and sums in float; probabilities, of exponentials relative to the greatest score so
// far, are rounded to bf16 before the second product, their sum is not. Keys come in tiles counted from position 0 and
// in one order, so a rerun is bit-equal and a row gives the same in any batch. The output is rounded once.
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
class PrefillSm80 {
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
      if constexpr (Traits::wide_heads) {
        allow_shared(attention_prefill_sm80_wide_kernel<Traits>, Traits::shared_bytes, "attention");
        attention_prefill_sm80_wide_kernel<Traits><<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(
            shape, q, keys, sequences, rows, out, lse);
      } else {
        allow_shared(attention_prefill_sm80_narrow_kernel<Traits>, Traits::shared_bytes, "attention");
        attention_prefill_sm80_narrow_kernel<Traits><<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(
            shape, q, keys, sequences, rows, out, lse);
      }
      check_launch("attention");
    });
  }

 private:
  template <class F>
  static auto with_traits(Index head_dim, F&& f) {
    if (head_dim <= 64) return f(PrefillSm80NarrowTraits<64, 64>{});
    if (head_dim <= 80) return f(PrefillSm80NarrowTraits<80, 64>{});
    if (head_dim <= 128) return f(PrefillSm80NarrowTraits<128, 64>{});
    if (head_dim <= 160) return f(PrefillSm80NarrowTraits<160, 32>{});
    if (head_dim <= 224) return f(PrefillSm80WideTraits<4, 7, 112, 64, 4>{});
    if (head_dim <= 256) return f(PrefillSm80WideTraits<4, 8, 128, 64, 3>{});
    if (head_dim <= 480) return f(PrefillSm80WideTraits<2, 15, 128, 32, 4>{});
    return f(PrefillSm80WideTraits<2, 16, 128, 32, 4>{});
  }
};

}  // namespace zamba::kernel
