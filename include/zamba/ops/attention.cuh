// SPDX-License-Identifier: MIT
// attention on CUDA; equations and shapes in attention.hpp.
//
// Decode: rows of few tokens over a cache go at the pace of memory, by split-KV decode as FlashDecoding
// (attention/decode.cuh, attention/splits.cuh). Prefill: longer rows of bf16 go through tensor cores, as FlashAttention
// (attention/prefill_sm90.cuh, attention/prefill_sm80.cuh); of other types, or where rows do not start at multiples of
// 16 bytes, through the decode kernel with one split. Backward: attention/backward.cuh.
//
// Numeric contract: scores, softmax and sums in compute_t; which way a row goes, its splits and the order of its keys
// follow from the row alone, so a rerun is bit-equal and nothing depends on the rest of the batch. Rounded once when
// written; on tensor cores the probabilities are rounded to bf16 too.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/append.cuh>
#include <zamba/ops/attention/backward.cuh>
#include <zamba/ops/attention/decode.cuh>
#include <zamba/ops/attention/prefill_sm80.cuh>
#include <zamba/ops/attention/prefill_sm90.cuh>
#include <zamba/ops/attention/splits.cuh>

namespace zamba {

template <>
struct Attention<cuda> {
  template <class A, class S, class F>
  static void forward(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q, Matrix<const A> k,
                      Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3> cache_v,
                      Matrix<A> out, Matrix<F> lse) {
    if (sequences.tokens == 0) return;
    check_shape(shape);
    if (!cache_k)
      return attend(ctx, shape, q, kernel::AttentionKeys<A>{of_all(k), of_all(v), false}, New<A, A>{}, sequences, out,
                    lse);
    const New<A, S> own{k, v, cache_k, cache_v};
    const bool few = sequences.longest <= few_tokens;  // their keys join the cache where they are read first
    if (!few) append(ctx, own, sequences);
    attend(ctx, shape, q, kernel::AttentionKeys<S>{cache_k, cache_v, true}, few ? own : New<A, S>{}, sequences, out,
           lse);
  }

  template <class Ctx, class A, class S, class F>
  static void scratch(Ctx& ctx, const AttentionShape& shape, Matrix<const A>, Matrix<const A>, Matrix<const A>,
                      const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3>, Matrix<A>, Matrix<F>) {
    if (cache_k && with_few(sequences))
      partial_results<F>(ctx, shape, most_splits(cache_k.shape[1]), places_of_few(sequences));
  }

  template <class A, class S, class F>
  static void backward(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> d_out, Matrix<const A> q,
                       Matrix<const A> k, Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k,
                       Tensor<S, 3> cache_v, Matrix<const A> out, Matrix<const F> lse, Matrix<A> d_q, Matrix<A> d_k,
                       Matrix<A> d_v, Tensor<F, 3> d_cache_k, Tensor<F, 3> d_cache_v) {
    if (sequences.tokens == 0) return;
    check_shape(shape);
    ArenaScope scope(ctx.arena());
    const Tensor<F, 3> sums = backward_scratch(ctx, shape, d_out, q, k, v, sequences);
    kernel::sum_attention_gradients(ctx, shape, d_out, out, lse, sums);
    const kernel::AttentionBackwardTensors<A> at{d_out, q, sums, d_q, {d_k, d_cache_k}, {d_v, d_cache_v}};
    if (!cache_k)
      return kernel::attention_gradients(ctx, shape, at, kernel::AttentionKeys<A>{of_all(k), of_all(v), false},
                                         sequences);
    const kernel::AttentionKeys<std::remove_const_t<S>> cached{cache_k, cache_v, true};
    kernel::attention_gradients(ctx, shape, at, cached, sequences);
  }
  /// (2, heads, tokens): what attention_gradients reads of the outputs.
  template <class Ctx, class A>
  static Tensor<compute_t<A>, 3> backward_scratch(Ctx& ctx, const AttentionShape& shape, Matrix<const A>,
                                                  Matrix<const A>, Matrix<const A>, Matrix<const A>,
                                                  const Sequences& sequences, const auto&...) {
    return ctx.arena().template tensor<compute_t<A>>(Index{2}, shape.heads, sequences.tokens);
  }

 private:
  /// Rows of at most so many tokens split their keys.
  static constexpr Index few_tokens = 4;
  static constexpr Index most_dimensions = 512;
  static_assert(most_dimensions <= kernel::PlainAttentionBackward::most_dimensions);

  static void check_shape(const AttentionShape& shape) {
    require(shape.head_dim <= most_dimensions, "attention: on CUDA head_dim is at most ", most_dimensions, ", got ",
            shape.head_dim);
    require(shape.heads % shape.kv_heads == 0, "attention: heads must be a multiple of kv_heads, got ", shape.heads,
            " and ", shape.kv_heads);
  }

  /// Keys and values of a batch's tokens, and where they go; none: they are there already.
  template <class A, class S>
  struct New {
    Matrix<const A> k, v;
    Tensor<S, 3> cache_k, cache_v;
  };

  /// Whether some rows are of few tokens, or may be.
  static bool with_few(const Sequences& sequences) {
    return sequences.longest <= few_tokens || sequences.rows * sequences.longest != sequences.tokens;
  }
  static Index places_of_few(const Sequences& sequences) {
    return sequences.rows * std::min(sequences.longest, few_tokens);
  }

  static Index most_splits(Index keys) {
    using Token = kernel::SplitToken;
    return std::min<Index>(ceil_div(keys, Token::min_keys), Token::max_splits);
  }
  /// (splits, places, heads, head_dim + 2); nothing of one split.
  template <class F, class Ctx>
  static Tensor<F, 4> partial_results(Ctx& ctx, const AttentionShape& shape, Index splits, Index places) {
    if (splits == 1) return {};
    return ctx.arena().template tensor<F>(splits, places, shape.heads, shape.head_dim + 2);
  }

  template <class A>
  static Tensor<const A, 3> of_all(Matrix<const A> m) {
    Tensor<const A, 3> all(m.data, 1, m.rows(), m.cols());
    all.stride[1] = m.stride[0];
    return all;
  }

  template <class A, class S>
  static void append(Context<cuda>& ctx, const New<A, S>& own, const Sequences& sequences) {
    const auto with = [&]<int Width>(std::integral_constant<int, Width>) {
      kernel::for_elements(ctx, own.k.rows(), 2 * own.k.cols() / Width,
                           kernel::AppendToCache<A, S, Width>{own.k, own.v, sequences, own.cache_k, own.cache_v},
                           "attention: append");
    };
    if constexpr (std::is_same_v<A, S>)
      if (kernel::in_vectors(own.k) && kernel::in_vectors(own.v) && kernel::in_vectors(own.cache_k) &&
          kernel::in_vectors(own.cache_v))
        return with(std::integral_constant<int, kernel::vector_width<A>>{});
    with(std::integral_constant<int, 1>{});
  }

  template <class A, class S, class F>
  static void attend(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const kernel::AttentionKeys<S>& keys, const New<A, S>& own, const Sequences& sequences,
                     Matrix<A> out, Matrix<F> lse) {
    if (with_few(sequences)) {
      const int per_row = static_cast<int>(std::min(sequences.longest, few_tokens));
      choose(ctx, shape, q, keys, own, sequences, {per_row, {1, few_tokens}}, out, lse);
    }
    if (sequences.longest <= few_tokens) return;
    const kernel::AttentionRows longer{few_tokens + 1, sequences.longest};
    if constexpr (std::is_same_v<A, bf16> && std::is_same_v<S, bf16>)
      if (kernel::PrefillSm80::fit(ctx, shape, q, keys, out)) {
        if (kernel::PrefillSm90::fit(ctx, shape, keys))
          return kernel::PrefillSm90::launch(ctx, shape, q, keys, sequences, longer, out, lse);
        return kernel::PrefillSm80::launch(ctx, shape, q, keys, sequences, longer, out, lse);
      }
    choose(ctx, shape, q, keys, New<A, S>{}, sequences, {0, longer}, out, lse);
  }

  template <class A, class S, class F>
  static void choose(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const kernel::AttentionKeys<S>& keys, const New<A, S>& own, const Sequences& sequences,
                     const kernel::AttentionPlaces& places, Matrix<A> out, Matrix<F> lse) {
    constexpr int wide = kernel::vector_width<S>;
    const bool vectorised = shape.head_dim % wide == 0 && kernel::aligned(q, kernel::vector_width<A>) &&
                            kernel::aligned(keys.k, wide) && kernel::aligned(keys.v, wide) &&
                            kernel::aligned(own.k, kernel::vector_width<A>) &&
                            kernel::aligned(own.v, kernel::vector_width<A>);
    const Index group = shape.heads / shape.kv_heads;
    const auto with = [&]<int Heads, int Lanes, int Width, int Vectors>(
                          kernel::AttentionDecodeTraits<A, S, Heads, Lanes, Width, Vectors>) {
      launch_vectors<Heads, Lanes, Width, Vectors>(ctx, shape, q, keys, own, sequences, places, out, lse);
    };
    if (!vectorised) return with(kernel::AttentionDecodeTraits<A, S, 1, 32, 1, 2>{});
    if constexpr (std::is_same_v<S, bf16>) {
      if (group > 2) return with(kernel::AttentionDecodeTraits<A, S, 4, 8, wide, 1>{});
      if (group == 2) return with(kernel::AttentionDecodeTraits<A, S, 2, 8, wide, 1>{});
      return with(kernel::AttentionDecodeTraits<A, S, 1, 8, wide, 1>{});
    }
    with(kernel::AttentionDecodeTraits<A, S, 1, 32, wide, 1>{});
  }

  /// With as many lanes, then vectors a lane, as a head needs.
  template <int Heads, int Lanes, int Width, int Vectors, class A, class S, class F>
  static void launch_vectors(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                             const kernel::AttentionKeys<S>& keys, const New<A, S>& own, const Sequences& sequences,
                             const kernel::AttentionPlaces& places, Matrix<A> out, Matrix<F> lse) {
    if constexpr (Lanes * Width * Vectors < most_dimensions) {
      constexpr int lanes = std::min(2 * Lanes, 32), vectors = Lanes < 32 ? Vectors : 2 * Vectors;
      if (shape.head_dim > Lanes * Width * Vectors)
        return launch_vectors<Heads, lanes, Width, vectors>(ctx, shape, q, keys, own, sequences, places, out, lse);
    }
    launch<kernel::AttentionDecodeTraits<A, S, Heads, Lanes, Width, Vectors>>(ctx, shape, q, keys, own, sequences,
                                                                              places, out, lse);
  }

  template <class Traits, class A, class S, class F>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const kernel::AttentionKeys<S>& keys, const New<A, S>& own, const Sequences& sequences,
                     const kernel::AttentionPlaces& places, Matrix<A> out, Matrix<F> lse) {
    const Index group = shape.heads / shape.kv_heads;
    const Index across = shape.kv_heads * ceil_div(group, Traits::heads);
    const Index down = places.per_row ? sequences.rows * places.per_row : sequences.tokens;
    ArenaScope scope(ctx.arena());
    const Index splits = keys.cached && places.per_row ? most_splits(keys.k.shape[1]) : 1;
    const Tensor<F, 4> partial = partial_results<F>(ctx, shape, splits, down);
    // Enough blocks to fill the GPU several times take the splits in turn: some rows may have few of the possible ones.
    const Index enough = 32 * ctx.multiprocessors() / (down * across);
    const dim3 grid(static_cast<unsigned>(down * across), static_cast<unsigned>(std::clamp<Index>(enough, 1, splits)));
    const Index of_teams = Traits::teams * Traits::heads * (shape.head_dim + 2);
    const auto shared = std::max(static_cast<std::size_t>(Traits::stages * Traits::stage_bytes),
                                 static_cast<std::size_t>(of_teams) * sizeof(F));
    const auto overlap = kernel::overlap_for(sequences.tokens);
    const typename Traits::Append append{own.k, own.v, sequences, own.cache_k, own.cache_v};
    kernel::launch(ctx, overlap, "attention", kernel::attention_decode_kernel<Traits>, grid, Traits::threads, shared,
                   shape, q, keys, append, sequences, places, partial, out, lse);
    if (!partial) return;
    using Combine = kernel::AttentionCombineTraits<A>;
    kernel::launch(ctx, overlap, "attention: combine", kernel::attention_combine_kernel<Combine>,
                   static_cast<unsigned>(down * shape.heads), Combine::threads, 0, shape, sequences, places, partial,
                   out, lse);
  }
};

}  // namespace zamba
