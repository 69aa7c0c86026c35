// SPDX-License-Identifier: MIT
// Prefill on the CPU: attention of rows of several tokens, tile by tile with an online softmax over blocks of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/softmax.hpp>
#include <zamba/ops/attention/tile.hpp>

namespace zamba::kernel {

/// A tile of queries, and its scratch. For each block of keys:
///   S = scale Q K^T,   m' = max(m, row_max(S)),   P = exp(S - m'),   sum = sum exp(m - m') + row_sum(P),
///   O = O exp(m - m') + P V
template <class A>
struct AttentionPrefillTile {
  static constexpr Index key_tile = AttentionTiling::keys;
  const AttentionTile& tile;
  A *products, *q, *o, *s, *max, *sum, *converted;

  AttentionPrefillTile(A* memory, const AttentionTile& of, Index R)
      : tile(of),
        products(memory),
        q(products + attention_product_scratch<A>(R, tile.head_dim)),  // (R, head_dim), times scale
        o(q + R * tile.head_dim),                                      // (R, head_dim)
        s(o + R * tile.head_dim),                                      // (R, key_tile): S, then P
        max(s + R * key_tile),                                         // (R): m
        sum(max + R),                                                  // (R)
        converted(sum + R) {}                                          // (key_tile, head_dim): keys or values

  /// Elements of a thread's scratch, for keys of S.
  template <class S>
  static Index scratch(const AttentionShape& shape, Index R) {
    const Index converted = std::is_same_v<A, S> ? 0 : key_tile * shape.head_dim;
    return attention_product_scratch<A>(R, shape.head_dim) +
           padded_to_line(R * (2 * shape.head_dim + key_tile + 2) + converted);
  }

  void load(const AttentionShape& shape, Matrix<const A> queries) {
    tile.gather(queries, static_cast<A>(shape.scale), q);
    std::fill_n(o, tile.rows() * tile.head_dim, A(0));
    std::fill_n(max, tile.rows(), std::numeric_limits<A>::lowest());
    std::fill_n(sum, tile.rows(), A(0));
  }

  /// n keys from j on; position: of the tile's first token, counted from key j.
  template <class S>
  void add(const RowKeys<S>& keys, Index j, Index n, Index position) {
    const Index rows = tile.rows(), head_dim = tile.head_dim;
    const Matrix<A> queries(q, rows, head_dim), sums(o, rows, head_dim), scores = strided(s, rows, n, key_tile);
    const auto k = in_compute_type(keys.k + j * keys.k_stride, keys.k_stride, n, head_dim, converted);
    set_product(scores, queries, transposed(k), products);
    online_softmax(position, n);
    const auto v = in_compute_type(keys.v + j * keys.v_stride, keys.v_stride, n, head_dim, converted);
    add_product(sums, scores, v, products);
  }

  /// S of n keys becomes P; O and sum are rescaled to the new maximum.
  void online_softmax(Index position, Index n) {
    for (Index r = 0; r < tile.rows(); ++r) {
      A* s_r = s + r * key_tile;
      const Index visible = tile.visible(r, position, n);
      std::fill(s_r + visible, s_r + n, A(0));
      if (visible == 0) continue;
      const A before = max[r], maximum = std::max(before, largest(s_r, visible));
      if (maximum != before) {
        const A rescale = std::exp(before - maximum);
        sum[r] *= rescale;
        scale(o + r * tile.head_dim, rescale, tile.head_dim, o + r * tile.head_dim);
        max[r] = maximum;
      }
      sum[r] += exponentials(s_r, maximum, visible);
    }
  }

  void store(Matrix<A> out, Matrix<A> lse) const {
    for (Index r = 0; r < tile.rows(); ++r) {
      const Index token = tile.token(r), head = tile.head(r);
      lse(token, head) = max[r] + std::log(sum[r]);
      scale(o + r * tile.head_dim, A(1) / sum[r], tile.head_dim, &out(token, head * tile.head_dim));
    }
  }
};

/// (threads, ...), for keys of S.
template <class A, class S, class Ctx>
Matrix<A> attention_prefill_scratch(Ctx& ctx, const AttentionShape& shape, const AttentionTiling& tiling) {
  return ctx.arena().template tensor<A>(Index{ctx.threads()},
                                        AttentionPrefillTile<A>::template scratch<S>(shape, tiling.rows));
}

/// Writes out and lse of rows of several tokens; others stay as they are.
template <class A, class Source>
void attention_prefill(Context<cpu>& ctx, const AttentionShape& shape, const AttentionTiling& tiling, Matrix<const A> q,
                       const Source& source, const Sequences& sequences, Matrix<A> out, Matrix<A> lse) {
  ArenaScope scope(ctx.arena());
  const Matrix<A> memory = attention_prefill_scratch<A, typename Source::S>(ctx, shape, tiling);
  const Index tasks_per_tile = sequences.rows * shape.kv_heads;
  ctx.parallel_for(tiling.per_row * tasks_per_tile, [&](Index task, int worker) {
    // Last tiles first: they see the most keys, and short tasks at the end keep the threads even.
    const Index first = (tiling.per_row - 1 - task / tasks_per_tile) * tiling.tokens;
    const Index row = task % tasks_per_tile / shape.kv_heads, kv_head = task % shape.kv_heads;
    const Index length = sequences.length(row);
    if (first >= length || length == 1) return;
    const AttentionTile tile{sequences.begin(row) + first, std::min(tiling.tokens, length - first), tiling.group,
                             kv_head * tiling.group, shape.head_dim};
    const auto keys = source(row, kv_head * shape.head_dim);
    AttentionPrefillTile<A> work(memory[worker].data, tile, tiling.rows);
    work.load(shape, q);
    const Index end = keys.past + first + tile.tokens;
    for (Index j = 0; j < end; j += AttentionTiling::keys)
      work.add(keys, j, std::min(AttentionTiling::keys, end - j), keys.past + first - j);
    work.store(out, lse);
  });
}

}  // namespace zamba::kernel
