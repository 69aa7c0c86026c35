// SPDX-License-Identifier: MIT
// attention: causal softmax attention with grouped heads, over a row's own tokens or over a cache.
//
//   out_i = sum_j p_ij v_j,   p_ij = exp(scale * q_i . k_j - lse_i),   lse_i = log sum_j exp(scale * q_i . k_j)
//
// for every head, j over the positions up to that of token i. Heads h of one group, h / (heads / kv_heads), share k, v.
//
// Source: Vaswani et al. (arXiv 1706.03762); grouped heads: arXiv 2305.13245; the online softmax over blocks of keys:
// Milakov and Gimelshein (arXiv 1805.02867).
//
// Shapes: q, out (tokens, heads * head_dim); k, v (tokens, kv_heads * head_dim); lse (tokens, heads);
// caches (rows, max_length, kv_heads * head_dim).
// Kept for the backward pass: out and lse; probabilities are computed again, block by block.
//   d_v_j = sum_i p_ij d_out_i,   d_s_ij = p_ij (d_out_i . v_j - d_out_i . out_i)
//   d_q_i = scale * sum_j d_s_ij k_j,   d_k_j = scale * sum_i d_s_ij q_i
//
// With a cache every key and value is read from it, so a bf16 cache rounds alike however a sequence is split; gradients
// pass through that rounding unchanged. Nothing beyond a row's last position is read.
//
// Numeric contract: products, softmax and sums in compute_t (float, or double for double); exp within 2e-7 relative in
// float. Every row, head and token is computed in blocks fixed by its own row alone: results do not depend on the rest
// of the batch or on the number of threads, and a rerun is bit-equal. Another split of a sequence agrees to rounding.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/error.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/ops/attention/backward.hpp>
#include <zamba/ops/attention/decode.hpp>
#include <zamba/ops/attention/prefill.hpp>
#include <zamba/ops/attention/shape.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(Attention, "attention.cuh");

/// cache_k, cache_v: both or neither (a Tensor<float, 3>{}); of float, double or bf16. Each row's k and v are written
/// at positions start .. start + length - 1, then its tokens attend to the cache up to their own position. Without
/// caches they attend to the row's own tokens.
template <class Device, class A, class S>
void attention(Context<Device>& ctx, const AttentionShape& shape, std::type_identity_t<Matrix<const A>> q,
               std::type_identity_t<Matrix<const A>> k, std::type_identity_t<Matrix<const A>> v,
               const Sequences& sequences, Tensor<S, 3> cache_k, std::type_identity_t<Tensor<S, 3>> cache_v,
               Matrix<A> out, Matrix<compute_t<A>> lse) {
  if constexpr (checked) {
    const kernel::Door door{"attention"};
    const Index n = sequences.tokens, width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
    door.shape("q", q, n, width);
    door.shape("k", k, n, kv_width);
    door.shape("v", v, n, kv_width);
    door.optional("cache_k", cache_k, sequences.rows, cache_k.shape[1], kv_width);
    door.optional("cache_v", cache_v, sequences.rows, cache_k.shape[1], kv_width);
    require(bool(cache_k) == bool(cache_v), door.name, ": one of the caches is missing");
    door.shape("out", out, n, width);
    door.shape("lse", lse, n, shape.heads);
  }
  Attention<Device>::template forward<A, S>(ctx, shape, q, k, v, sequences, cache_k, cache_v, out, lse);
}

/// Caches as the forward pass left them (S may be const). d_q, d_k, d_v are assigned. d_cache_k, d_cache_v, shaped like
/// the caches, are optional; in: gradients of the final caches, out: those of the initial ones. Positions before the
/// start of a row are added to; the row's own positions move into d_k, d_v and become zero.
template <class Device, class A, class S>
void attention_backward(Context<Device>& ctx, const AttentionShape& shape, std::type_identity_t<Matrix<const A>> d_out,
                        std::type_identity_t<Matrix<const A>> q, std::type_identity_t<Matrix<const A>> k,
                        std::type_identity_t<Matrix<const A>> v, const Sequences& sequences, Tensor<S, 3> cache_k,
                        std::type_identity_t<Tensor<S, 3>> cache_v, std::type_identity_t<Matrix<const A>> out,
                        Matrix<const compute_t<A>> lse, Matrix<A> d_q, std::type_identity_t<Matrix<A>> d_k,
                        std::type_identity_t<Matrix<A>> d_v, Tensor<compute_t<A>, 3> d_cache_k,
                        Tensor<compute_t<A>, 3> d_cache_v) {
  if constexpr (checked) {
    const kernel::Door door{"attention_backward"};
    const Index n = sequences.tokens, width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
    door.shape("d_out", d_out, n, width);
    door.shape("q", q, n, width);
    door.shape("k", k, n, kv_width);
    door.shape("v", v, n, kv_width);
    door.optional("cache_k", cache_k, sequences.rows, cache_k.shape[1], kv_width);
    door.optional("cache_v", cache_v, sequences.rows, cache_k.shape[1], kv_width);
    require(bool(cache_k) == bool(cache_v), door.name, ": one of the caches is missing");
    door.shape("out", out, n, width);
    door.shape("lse", lse, n, shape.heads);
    door.shape("d_q", d_q, n, width);
    door.shape("d_k", d_k, n, kv_width);
    door.shape("d_v", d_v, n, kv_width);
    door.optional("d_cache_k", d_cache_k, sequences.rows, cache_k.shape[1], kv_width);
    door.optional("d_cache_v", d_cache_v, sequences.rows, cache_k.shape[1], kv_width);
  }
  Attention<Device>::template backward<A, S>(ctx, shape, d_out, q, k, v, sequences, cache_k, cache_v, out, lse, d_q,
                                             d_k, d_v, d_cache_k, d_cache_v);
}

/// Prefill (attention/prefill.hpp) for rows of several tokens, split-KV decode (attention/decode.hpp) for those of one.
template <>
struct Attention<cpu> {
  template <class A, class S, class F>
  static void forward(Context<cpu>& ctx, const AttentionShape& shape, Matrix<const A> q, Matrix<const A> k,
                      Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3> cache_v,
                      Matrix<A> out, Matrix<F> lse) {
    if (!cache_k) return attend(ctx, shape, q, kernel::OwnKeys<A>{k, v, sequences}, sequences, out, lse);
    append(ctx, k, sequences, cache_k);
    append(ctx, v, sequences, cache_v);
    attend(ctx, shape, q, kernel::CachedKeys<S>{cache_k, cache_v, sequences}, sequences, out, lse);
  }

  template <class Ctx, class A, class S, class F>
  static void scratch(Ctx& ctx, const AttentionShape& shape, Matrix<const A>, Matrix<const A>, Matrix<const A>,
                      const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3>, Matrix<A>, Matrix<F>) {
    if (sequences.longest > 1) {
      ArenaScope scope(ctx.arena());
      const kernel::AttentionTiling tiling(shape, sequences);
      if (cache_k)
        kernel::attention_prefill_scratch<A, S>(ctx, shape, tiling);
      else
        kernel::attention_prefill_scratch<A, A>(ctx, shape, tiling);
    }
    if (sequences.rows > 1 || sequences.longest == 1)
      decode(shape).template scratch<A>(ctx, cache_k ? cache_k.shape[1] : 1, sequences);
  }

  template <class A, class S, class F>
  static void backward(Context<cpu>& ctx, const AttentionShape& shape, Matrix<const A> d_out, Matrix<const A> q,
                       Matrix<const A> k, Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k,
                       Tensor<S, 3> cache_v, Matrix<const A> out, Matrix<const F> lse, Matrix<A> d_q, Matrix<A> d_k,
                       Matrix<A> d_v, Tensor<F, 3> d_cache_k, Tensor<F, 3> d_cache_v) {
    static_assert(std::is_same_v<A, F>, "zamba: on the CPU activations are of the compute type");
    using kernel::attention_backward_tiles, kernel::CachedKeys, kernel::OwnKeys;
    const kernel::AttentionGradients<A> at{d_out, q, out, lse, d_q, d_k, d_v, d_cache_k, d_cache_v};
    if (!cache_k) return attention_backward_tiles(ctx, shape, at, OwnKeys<A>{k, v, sequences}, sequences);
    const CachedKeys<std::remove_const_t<S>> cached{cache_k, cache_v, sequences};
    attention_backward_tiles(ctx, shape, at, cached, sequences);
  }
  template <class Ctx, class A, class S>
  static void backward_scratch(Ctx& ctx, const AttentionShape& shape, Matrix<const A>, Matrix<const A>, Matrix<const A>,
                               Matrix<const A>, const Sequences& sequences, Tensor<S, 3> cache_k, const auto&...) {
    using kernel::attention_backward_scratch;
    if (cache_k)
      attention_backward_scratch<A, std::remove_const_t<S>>(ctx, shape, sequences);
    else
      attention_backward_scratch<A, A>(ctx, shape, sequences);
  }

 private:
  static kernel::AttentionDecode decode(const AttentionShape& shape) {
    return {shape.heads, shape.kv_heads, shape.head_dim, shape.scale};
  }

  template <class A, class Source>
  static void attend(Context<cpu>& ctx, const AttentionShape& shape, Matrix<const A> q, const Source& source,
                     const Sequences& sequences, Matrix<A> out, Matrix<A> lse) {
    static_assert(std::is_same_v<A, compute_t<A>>, "zamba: on the CPU activations are of the compute type");
    const kernel::AttentionTiling tiling(shape, sequences);
    if (sequences.longest > 1) kernel::attention_prefill(ctx, shape, tiling, q, source, sequences, out, lse);
    Index most_keys = 0;  // of a row of one token
    for (Index row = 0; row < sequences.rows; ++row)
      if (sequences.length(row) == 1) most_keys = std::max(most_keys, source(row, 0).past + 1);
    if (most_keys > 0) decode(shape).attend(ctx, most_keys, q, source, sequences, out, lse);
  }

  /// Writes each row's new keys or values at the end of its cache.
  template <class A, class S>
  static void append(Context<cpu>& ctx, Matrix<const A> from, const Sequences& sequences, Tensor<S, 3> cache) {
    constexpr Index at_once = 64;  // tokens of a task
    for (Index row = 0; row < sequences.rows; ++row)
      require(sequences.start(row) + sequences.length(row) <= cache.shape[1], "attention: row ", row, " needs ",
              sequences.start(row) + sequences.length(row), " positions, its cache has ", cache.shape[1]);
    const Index tasks = ceil_div(sequences.longest, at_once);
    ctx.parallel_for(sequences.rows * tasks, [&](Index task, int) {
      const Index row = task / tasks, first = task % tasks * at_once;
      const Index last = std::min(first + at_once, sequences.length(row));
      for (Index t = first; t < last; ++t) {
        const A* token = &from(sequences.begin(row) + t, 0);
        S* to = &cache(row, sequences.start(row) + t, 0);
        for (Index c = 0; c < from.cols(); ++c) to[c] = static_cast<S>(token[c]);
      }
    });
  }
};

}  // namespace zamba
