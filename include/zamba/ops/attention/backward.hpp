// SPDX-License-Identifier: MIT
// The backward pass of attention on the CPU: probabilities are computed again, block by block of keys, as
// FlashAttention does; equations in ops/attention.hpp.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/kernel/softmax.hpp>
#include <zamba/ops/attention/tile.hpp>

namespace zamba::kernel {

/// What the pass reads and writes but keys and values; shapes in ops/attention.hpp.
template <class A>
struct AttentionGradients {
  Matrix<const A> d_out, q, out, lse;
  Matrix<A> d_q, d_k, d_v;
  Tensor<A, 3> d_cache_k, d_cache_v;
};

/// A tile of queries, and its scratch.
template <class A>
struct AttentionBackwardTile {
  static constexpr Index key_tile = AttentionTiling::keys;
  const AttentionTile& tile;
  A *products, *q, *d_out, *d_q, *p, *d_s, *lse, *dots, *k_scratch, *v_scratch;

  AttentionBackwardTile(A* memory, const AttentionTile& of, Index R)
      : tile(of),
        products(memory),
        q(products + attention_product_scratch<A>(R, tile.head_dim)),  // (R, head_dim), times scale
        d_out(q + R * tile.head_dim),                                  // (R, head_dim)
        d_q(d_out + R * tile.head_dim),                                // (R, head_dim), over scale
        p(d_q + R * tile.head_dim),                                    // (R, key_tile)
        d_s(p + R * key_tile),                                         // (R, key_tile)
        lse(d_s + R * key_tile),                                       // (R)
        dots(lse + R),                                                 // (R): d_out . out
        k_scratch(dots + R),                                           // (key_tile, head_dim)
        v_scratch(k_scratch + key_tile * tile.head_dim) {}

  /// Elements of a thread's scratch, for keys of S.
  template <class S>
  static Index scratch(const AttentionShape& shape, Index R) {
    const Index converted = std::is_same_v<A, S> ? 0 : 2 * key_tile * shape.head_dim;
    return attention_product_scratch<A>(R, shape.head_dim) +
           padded_to_line(R * (3 * shape.head_dim + 2 * key_tile + 2) + converted);
  }

  void load(const AttentionShape& shape, const AttentionGradients<A>& at) {
    tile.gather(at.q, static_cast<A>(shape.scale), q);
    tile.gather(at.d_out, A(1), d_out);
    std::fill_n(d_q, tile.rows() * tile.head_dim, A(0));
    for (Index r = 0; r < tile.rows(); ++r) {
      const Index token = tile.token(r), head = tile.head(r);
      lse[r] = at.lse(token, head);
      const A *dy = d_out + r * tile.head_dim, *y = &at.out(token, head * tile.head_dim);
      Pack<A> sum = zeros<A>();
      for_packs<A>(tile.head_dim, [&](Index c, auto n) { sum += kernel::load(dy + c, n) * kernel::load(y + c, n); });
      dots[r] = kernel::sum<A>(sum);
    }
  }

  /// Adds the share of n keys from j to d_q, and to d_k and d_v (n, head_dim) where they are given; position: of the
  /// tile's first token, counted from key j.
  template <class S>
  void accumulate(const RowKeys<S>& keys, Index j, Index n, Index position, Matrix<A> d_k, Matrix<A> d_v) {
    const Index rows = tile.rows(), head_dim = tile.head_dim;
    const auto k = in_compute_type<A>(keys.k + j * keys.k_stride, keys.k_stride, n, head_dim, k_scratch);
    const auto v = in_compute_type<A>(keys.v + j * keys.v_stride, keys.v_stride, n, head_dim, v_scratch);
    const Matrix<A> x(q, rows, head_dim), dy(d_out, rows, head_dim), d_x(d_q, rows, head_dim);
    const Matrix<A> probabilities = strided(p, rows, n, key_tile), scores = strided(d_s, rows, n, key_tile);
    set_product(probabilities, x, transposed(k), products);
    set_product(scores, dy, transposed(v), products);
    for (Index r = 0; r < rows; ++r) {
      A *p_r = p + r * key_tile, *s_r = d_s + r * key_tile;
      const Index visible = tile.visible(r, position, n);
      for_packs<A>(visible, [&](Index c, auto count) {
        const Pack<A> e = exp<A>(kernel::load(p_r + c, count) - lse[r]);
        store(p_r + c, e, count);
        store(s_r + c, Pack<A>(e * (kernel::load(s_r + c, count) - dots[r])), count);
      });
      std::fill(p_r + visible, p_r + n, A(0));
      std::fill(s_r + visible, s_r + n, A(0));
    }
    add_product(d_x, scores, k, products);
    if (!d_k) return;
    add_product(d_k, transposed(scores), x, products);
    add_product(d_v, transposed(probabilities), dy, products);
  }

  void store_d_q(const AttentionShape& shape, Matrix<A> to) const {
    const Index width = tile.group * tile.head_dim;
    for (Index t = 0; t < tile.tokens; ++t)
      scale(d_q + t * width, static_cast<A>(shape.scale), width, &to(tile.first + t, tile.column()));
  }
};

/// gradient (length, head_dim) begins with that of the row's own positions in the final cache, which are then zero.
template <class A>
void take_gradient(Tensor<A, 3> d_cache, Index row, Index past, Index column, Matrix<A> gradient) {
  for (Index t = 0; t < gradient.rows(); ++t) {
    A* to = &gradient(t, 0);
    A* from = d_cache ? &d_cache(row, past + t, column) : nullptr;
    if (from) std::copy_n(from, gradient.cols(), to);
    std::fill_n(from ? from : to, gradient.cols(), A(0));
  }
}

/// (threads, ...), for keys of S.
template <class A, class S, class Ctx>
Matrix<A> attention_backward_scratch(Ctx& ctx, const AttentionShape& shape, const Sequences& sequences) {
  const Index rows = AttentionTiling(shape, sequences).rows;
  return ctx.arena().template tensor<A>(Index{ctx.threads()},
                                        AttentionBackwardTile<A>::template scratch<S>(shape, rows));
}

/// One task a row and key head, so every gradient of a key or value has one writer.
template <class A, class Source>
void attention_backward_tiles(Context<cpu>& ctx, const AttentionShape& shape, const AttentionGradients<A>& at,
                              const Source& source, const Sequences& sequences) {
  const AttentionTiling tiling(shape, sequences);
  const Index head_dim = shape.head_dim;
  ArenaScope scope(ctx.arena());
  const auto scratch = attention_backward_scratch<A, typename Source::S>(ctx, shape, sequences);
  ctx.parallel_for(sequences.rows * shape.kv_heads, [&](Index task, int worker) {
    const Index row = task / shape.kv_heads, kv_head = task % shape.kv_heads, column = kv_head * head_dim;
    const Index length = sequences.length(row), begin = sequences.begin(row);
    if (length == 0) return;
    const auto keys = source(row, column);
    const Matrix<A> own_d_k = at.d_k.slice(begin, length).columns(column, head_dim);
    const Matrix<A> own_d_v = at.d_v.slice(begin, length).columns(column, head_dim);
    take_gradient(at.d_cache_k, row, keys.past, column, own_d_k);
    take_gradient(at.d_cache_v, row, keys.past, column, own_d_v);
    for (Index first = 0; first < length; first += tiling.tokens) {
      const AttentionTile tile{begin + first, std::min(tiling.tokens, length - first), tiling.group,
                               kv_head * tiling.group, head_dim};
      AttentionBackwardTile<A> work(scratch[worker].data, tile, tiling.rows);
      work.load(shape, at);
      // Blocks end at the row's first token: gradients of what lies before go to the cache, of the rest to d_k, d_v.
      const Index end = keys.past + first + tile.tokens;
      for (Index j = 0, n; j < end; j += n) {
        const bool past = j < keys.past;
        n = std::min(AttentionTiling::keys, (past ? keys.past : end) - j);
        Matrix<A> d_k, d_v;
        if (!past) {
          d_k = own_d_k.slice(j - keys.past, n);
          d_v = own_d_v.slice(j - keys.past, n);
        } else if (at.d_cache_k) {
          d_k = at.d_cache_k[row].slice(j, n).columns(column, head_dim);
          d_v = at.d_cache_v[row].slice(j, n).columns(column, head_dim);
        }
        work.accumulate(keys, j, n, keys.past + first - j, d_k, d_v);
      }
      work.store_d_q(shape, at.d_q);
    }
  });
}

}  // namespace zamba::kernel
