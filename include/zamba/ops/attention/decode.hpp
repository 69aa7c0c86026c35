// SPDX-License-Identifier: MIT
// Split-KV decode on the CPU, as FlashDecoding: attention of rows of one token, at the pace of memory.
//
// A task streams one split of a row's keys and values, all heads of them, in the order in which they lie in memory:
//   m = max_j s_j,   t = sum_j exp(s_j - m),   o = sum_j exp(s_j - m) v_j,   s_j = scale * q . k_j
// Then the splits of a row are combined in order: out = sum_splits exp(m - M) o / sum_splits exp(m - M) t, M the
// largest m. Splits begin at multiples of a fixed length, so a row's result depends on nothing but the row.
#pragma once

#include <algorithm>
#include <cmath>

#include <zamba/context.hpp>
#include <zamba/device.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/kernel/softmax.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

struct AttentionDecode {
  Index heads, kv_heads, head_dim;
  double scale;

  /// Writes out (tokens, heads * head_dim) and lse (tokens, heads) of the rows of one token; others stay as they are.
  /// most_keys: of any such row. source(row, 0) names where the row's keys and values are (k, v, k_stride, v_stride)
  /// and how many come before its token (past).
  template <class A, class Source>
  void attend(Context<cpu>& ctx, Index most_keys, Matrix<const A> q, const Source& source, const Sequences& sequences,
              Matrix<A> out, Matrix<A> lse) const {
    const Index width = heads * head_dim, splits = ceil_div(most_keys, split_keys);
    ArenaScope scope(ctx.arena());
    const Scratch<A> memory = scratch<A>(ctx, most_keys, sequences);
    ctx.parallel_for(sequences.rows * splits, [&](Index task, int worker) {
      const Index row = task / splits, split = task % splits, first = split * split_keys;
      if (sequences.length(row) != 1) return;
      const auto keys = source(row, 0);
      if (first > keys.past) return;
      const Index n = std::min(split_keys, keys.past + 1 - first);
      A *query = memory.of_worker[worker].data, *scores = query + width;  // (heads, head_dim); (heads, split_keys)
      kernel::scale(&q(sequences.begin(row), 0), static_cast<A>(scale), width, query);
      set_scores(query, keys.k + first * keys.k_stride, keys.k_stride, n, scores);
      for (Index head = 0; head < heads; ++head) {
        A* s = scores + head * split_keys;
        memory.extents(row, split, head, 0) = largest(s, n);
        memory.extents(row, split, head, 1) = exponentials(s, memory.extents(row, split, head, 0), n);
      }
      A* sum = &memory.sums(row, split, 0);
      std::fill_n(sum, width, A(0));
      add_values(scores, keys.v + first * keys.v_stride, keys.v_stride, n, sum);
    });
    ctx.parallel_for(sequences.rows, [&](Index row, int) {
      if (sequences.length(row) != 1) return;
      const Index of_row = source(row, 0).past / split_keys + 1;
      combine(memory.sums[row].slice(0, of_row), memory.extents[row].slice(0, of_row), out[sequences.begin(row)],
              lse[sequences.begin(row)]);
    });
  }

  template <class A>
  struct Scratch {
    Matrix<A> of_worker;   // (threads, ...): a query; its scores
    Tensor<A, 3> sums;     // (rows, splits, heads * head_dim) of exp(score - maximum) * v
    Tensor<A, 4> extents;  // (rows, splits, heads, 2): maximum; sum of exponentials
  };
  template <class A, class Ctx>
  Scratch<A> scratch(Ctx& ctx, Index most_keys, const Sequences& sequences) const {
    const Index width = heads * head_dim, splits = ceil_div(most_keys, split_keys);
    return {ctx.arena().template tensor<A>(Index{ctx.threads()}, width + heads * split_keys),
            ctx.arena().template tensor<A>(sequences.rows, splits, width),
            ctx.arena().template tensor<A>(sequences.rows, splits, heads, 2)};
  }

 private:
  /// Keys of one split.
  static constexpr Index split_keys = 128;

  /// The rows of n keys or values from j on, at most four; beyond the last one it is named again.
  template <class S>
  struct Four {
    const S* row[4];

    Four(const S* rows, Index stride, Index j, Index n) {
      for (Index i = 0; i < 4; ++i) row[i] = rows + std::min(j + i, n - 1) * stride;
    }

    /// Asks for element c of each row: a row is too short for the hardware to foresee the next one in time.
    [[gnu::always_inline]] void prefetch(Index c) const {
      __builtin_prefetch(row[0] + c);
      __builtin_prefetch(row[1] + c);
      __builtin_prefetch(row[2] + c);
      __builtin_prefetch(row[3] + c);
    }
  };

  /// scores (heads, split_keys) of n keys.
  template <class A, class S>
  void set_scores(const A* query, const S* keys, Index stride, Index n, A* scores) const {
    const Index all = heads, width = head_dim, group = all / kv_heads;
    for (Index j = 0; j < n; j += 4) {
      const Four<S> four(keys, stride, j, n), next(keys, stride, j + 4, n);
      for (Index head = 0; head < all; ++head) {
        const Index column = head / group * width;
        const S *k0 = four.row[0] + column, *k1 = four.row[1] + column, *k2 = four.row[2] + column,
                *k3 = four.row[3] + column;
        const A* x = query + head * width;
        Pack<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
        for_packs<A>(
            width, [&](Index c, auto count) __attribute__((always_inline)) {
              const Pack<A> x_c = load(x + c, count);
              next.prefetch(column + c);
              s0 += x_c * load_as<A>(k0 + c, count);
              s1 += x_c * load_as<A>(k1 + c, count);
              s2 += x_c * load_as<A>(k2 + c, count);
              s3 += x_c * load_as<A>(k3 + c, count);
            });
        const A dots[4] = {sum<A>(s0), sum<A>(s1), sum<A>(s2), sum<A>(s3)};
        std::copy_n(dots, std::min(Index{4}, n - j), scores + head * split_keys + j);
      }
    }
  }

  /// sums (heads, head_dim) += exponentials (heads, split_keys) of n keys times their values.
  template <class A, class S>
  void add_values(const A* exponentials, const S* values, Index stride, Index n, A* sums) const {
    const Index all = heads, width = head_dim, group = all / kv_heads;
    for (Index j = 0; j < n; j += 4) {
      const Four<S> four(values, stride, j, n), next(values, stride, j + 4, n);
      for (Index head = 0; head < all; ++head) {
        const Index column = head / group * width;
        const S *v0 = four.row[0] + column, *v1 = four.row[1] + column, *v2 = four.row[2] + column,
                *v3 = four.row[3] + column;
        const A* p = exponentials + head * split_keys + j;
        const A p0 = p[0], p1 = n - j > 1 ? p[1] : A(0), p2 = n - j > 2 ? p[2] : A(0), p3 = n - j > 3 ? p[3] : A(0);
        A* sum = sums + head * width;
        for_packs<A>(
            width, [&](Index c, auto count) __attribute__((always_inline)) {
              next.prefetch(column + c);
              const Pack<A> first = p0 * load_as<A>(v0 + c, count) + p1 * load_as<A>(v1 + c, count);
              const Pack<A> second = p2 * load_as<A>(v2 + c, count) + p3 * load_as<A>(v3 + c, count);
              store(sum + c, Pack<A>(load(sum + c, count) + (first + second)), count);
            });
      }
    }
  }

  /// One token's out (heads * head_dim) and lse (heads) from the splits of its row: sums (splits, heads * head_dim)
  /// and extents (splits, heads, 2).
  template <class A>
  void combine(Matrix<A> sums, Tensor<A, 3> extents, Vector<A> out, Vector<A> lse) const {
    for (Index head = 0; head < heads; ++head) {
      const Index column = head * head_dim;
      A maximum = extents(0, head, 0), total = 0;
      for (Index split = 1; split < sums.rows(); ++split) maximum = std::max(maximum, extents(split, head, 0));
      std::fill_n(&out[column], head_dim, A(0));
      for (Index split = 0; split < sums.rows(); ++split) {
        const A factor = std::exp(extents(split, head, 0) - maximum);
        total += factor * extents(split, head, 1);
        for_packs<A>(head_dim, [&, from = &sums(split, column), to = &out[column]](Index c, auto count) {
          store(to + c, Pack<A>(load(to + c, count) + factor * load(from + c, count)), count);
        });
      }
      lse[head] = maximum + std::log(total);
      kernel::scale(&out[column], A(1) / total, head_dim, &out[column]);
    }
  }
};

}  // namespace zamba::kernel
