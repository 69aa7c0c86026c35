// SPDX-License-Identifier: MIT
// attention: causal softmax attention with grouped heads, over a row's own tokens or over a cache.
//
//   out_i = sum_j p_ij v_j,   p_ij = exp(scale * q_i . k_j - lse_i),   lse_i = log sum_j exp(scale * q_i . k_j)
//
// for every head, j over the positions up to that of token i. Heads h of one group, h / (heads / kv_heads), share k, v.
//
// Source: Vaswani et al. (arXiv 1706.03762); grouped heads: arXiv 2305.13245; the running softmax over blocks of keys:
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
#include <cmath>
#include <limits>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/error.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/kernel/softmax.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/ops/attention/decode.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

struct AttentionShape {
  Index heads = 0, kv_heads = 0, head_dim = 0;  // heads is a multiple of kv_heads
  double scale = 0;
};

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

/// A task takes one key head and a tile of tokens; the queries of the group's heads are stacked, so that one product
/// serves all of them. Rows of one token go another way, at the pace of memory.
template <>
struct Attention<cpu> {
  template <class A, class S, class F>
  static void forward(Context<cpu>& ctx, const AttentionShape& shape, Matrix<const A> q, Matrix<const A> k,
                      Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3> cache_v,
                      Matrix<A> out, Matrix<F> lse) {
    if (!cache_k) return attend(ctx, shape, q, OwnTokens<A>{k, v, sequences}, sequences, out, lse);
    append(ctx, k, sequences, cache_k);
    append(ctx, v, sequences, cache_v);
    attend(ctx, shape, q, Cached<S>{cache_k, cache_v, sequences}, sequences, out, lse);
  }

  template <class Ctx, class A, class S, class F>
  static void scratch(Ctx& ctx, const AttentionShape& shape, Matrix<const A>, Matrix<const A>, Matrix<const A>,
                      const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3>, Matrix<A>, Matrix<F>) {
    if (sequences.longest > 1) {
      ArenaScope scope(ctx.arena());
      if (cache_k)
        tile_scratch<A, S>(ctx, shape, Tiling(shape, sequences));
      else
        tile_scratch<A, A>(ctx, shape, Tiling(shape, sequences));
    }
    if (sequences.rows > 1 || sequences.longest == 1)
      stream_of(shape).template scratch<A>(ctx, cache_k ? cache_k.shape[1] : 1, sequences);
  }

  template <class A, class S, class F>
  static void backward(Context<cpu>& ctx, const AttentionShape& shape, Matrix<const A> d_out, Matrix<const A> q,
                       Matrix<const A> k, Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k,
                       Tensor<S, 3> cache_v, Matrix<const A> out, Matrix<const F> lse, Matrix<A> d_q, Matrix<A> d_k,
                       Matrix<A> d_v, Tensor<F, 3> d_cache_k, Tensor<F, 3> d_cache_v) {
    const Backward<A> at{d_out, q, out, lse, d_q, d_k, d_v, d_cache_k, d_cache_v};
    if (!cache_k) return differentiate(ctx, shape, at, OwnTokens<A>{k, v, sequences}, sequences);
    differentiate(ctx, shape, at, Cached<std::remove_const_t<S>>{cache_k, cache_v, sequences}, sequences);
  }

 private:
  template <class A>
  using Pack = kernel::Pack<A>;

  /// Queries (tokens times heads of a group) of one product, where a group has not more.
  static constexpr Index query_tile = 64;
  /// Keys of one product.
  static constexpr Index key_tile = 512;
  /// Where the keys and values of a row and a key head are; position j is at k + j * k_stride.
  template <class S>
  struct Keys {
    using type = S;
    const S *k, *v;
    Index k_stride, v_stride;
    Index past;  // the position of the row's first token
  };

  template <class S>
  struct OwnTokens {
    using type = S;
    Matrix<const S> k, v;
    const Sequences& sequences;

    Keys<S> operator()(Index row, Index column) const {
      const Index first = sequences.begin(row);
      return {&k(first, column), &v(first, column), k.stride[0], v.stride[0], 0};
    }
  };

  template <class S>
  struct Cached {
    using type = S;
    Tensor<const S, 3> k, v;
    const Sequences& sequences;

    Keys<S> operator()(Index row, Index column) const {
      return {&k(row, 0, column), &v(row, 0, column), k.stride[1], v.stride[1], sequences.start(row)};
    }
  };

  template <class A>
  struct Backward {
    Matrix<const A> d_out, q, out, lse;
    Matrix<A> d_q, d_k, d_v;
    Tensor<A, 3> d_cache_k, d_cache_v;
  };

  /// The division of a batch into tiles.
  struct Tiling {
    Index group, tokens, rows, per_row;  // heads of a group; tokens and queries of a tile; tiles of the longest row

    Tiling(const AttentionShape& shape, const Sequences& sequences) : group(shape.heads / shape.kv_heads) {
      require(group * shape.kv_heads == shape.heads, "attention: heads must be a multiple of kv_heads, got ",
              shape.heads, " and ", shape.kv_heads);
      const Index most = std::max(Index{1}, query_tile / group);
      tokens = std::clamp(sequences.longest, Index{1}, most);
      rows = tokens * group;
      per_row = ceil_div(sequences.longest, tokens);
    }
  };

  /// Consecutive tokens of a row with the heads of one group: query r is head r % group of token r / group.
  struct Tile {
    Index token;                  // the first one, in the batch
    Index tokens;                 // at least 1
    Index group, head, head_dim;  // head: the group's first

    Index rows() const { return tokens * group; }
    Index column() const { return head * head_dim; }

    /// (rows, head_dim), contiguous, from (tokens, heads * head_dim).
    template <class A>
    void gather(Matrix<const A> from, A factor, A* to) const {
      for (Index t = 0; t < tokens; ++t)
        kernel::for_packs<A>(group * head_dim, [&, at = &from(token + t, column())](Index c, auto n) {
          kernel::store(to + t * group * head_dim + c, Pack<A>(factor * kernel::load(at + c, n)), n);
        });
    }
  };

  /// Rows of `cols` elements that lie `stride` apart.
  template <class A>
  static Matrix<A> strided(A* data, Index rows, Index cols, Index stride) {
    Matrix<A> view(data, rows, cols);
    view.stride[0] = stride;
    return view;
  }

  /// Scratch of the products of `rows` queries with a block of keys or values.
  template <class A>
  static Index products_of(Index rows, Index head_dim) {
    return std::max({kernel::product_scratch<A>(rows, head_dim, key_tile),
                     kernel::product_scratch<A>(rows, key_tile, head_dim),
                     kernel::product_scratch<A>(key_tile, rows, head_dim)});
  }
  static Index padded(Index count) { return ceil_div(count, 16) * 16; }

  /// (n, head_dim) in the compute type: where it lies, or converted into scratch.
  template <class A, class S>
  static Matrix<const A> block(const S* from, Index stride, Index n, Index head_dim, A* scratch) {
    if constexpr (std::is_same_v<A, S>) {
      return strided(from, n, head_dim, stride);
    } else {
      for (Index j = 0; j < n; ++j)
        kernel::for_packs<A>(head_dim, [&](Index c, auto count) {
          kernel::store(scratch + j * head_dim + c, kernel::load_as<A>(from + j * stride + c, count), count);
        });
      return {scratch, n, head_dim};
    }
  }

  /// Writes each row's new keys or values at the end of its cache.
  template <class A, class S>
  static void append(Context<cpu>& ctx, Matrix<const A> from, const Sequences& sequences, Tensor<S, 3> cache) {
    for (Index row = 0; row < sequences.rows; ++row)
      require(sequences.start(row) + sequences.length(row) <= cache.shape[1], "attention: row ", row, " needs ",
              sequences.start(row) + sequences.length(row), " positions, its cache has ", cache.shape[1]);
    const Index pieces = ceil_div(sequences.longest, query_tile);
    ctx.parallel_for(sequences.rows * pieces, [&](Index task, int) {
      const Index row = task / pieces, first = task % pieces * query_tile;
      const Index last = std::min(first + query_tile, sequences.length(row));
      for (Index t = first; t < last; ++t) {
        const A* token = &from(sequences.begin(row) + t, 0);
        S* to = &cache(row, sequences.start(row) + t, 0);
        for (Index c = 0; c < from.cols(); ++c) to[c] = static_cast<S>(token[c]);
      }
    });
  }

  template <class A, class Source>
  static void attend(Context<cpu>& ctx, const AttentionShape& shape, Matrix<const A> q, const Source& source,
                     const Sequences& sequences, Matrix<A> out, Matrix<A> lse) {
    static_assert(std::is_same_v<A, compute_t<A>>, "zamba: on the CPU activations are of the compute type");
    const Tiling tiling(shape, sequences);
    if (sequences.longest > 1) attend_tiles(ctx, shape, tiling, q, source, sequences, out, lse);
    Index most_keys = 0;  // of a row of one token
    for (Index row = 0; row < sequences.rows; ++row)
      if (sequences.length(row) == 1) most_keys = std::max(most_keys, source(row, 0).past + 1);
    if (most_keys > 0) stream_of(shape).attend(ctx, most_keys, q, source, sequences, out, lse);
  }

  static kernel::AttentionDecode stream_of(const AttentionShape& shape) {
    return {shape.heads, shape.kv_heads, shape.head_dim, shape.scale};
  }

  /// (threads, ...): scratch of products, queries, sums and scores of a tile, and its keys or values converted where
  /// that is needed.
  template <class A, class S, class Ctx>
  static Matrix<A> tile_scratch(Ctx& ctx, const AttentionShape& shape, const Tiling& tiling) {
    const Index converted = std::is_same_v<A, S> ? 0 : key_tile * shape.head_dim;
    const Index size = tiling.rows * (2 * shape.head_dim + key_tile + 2) + converted;
    return ctx.arena().template tensor<A>(Index{ctx.threads()},
                                          products_of<A>(tiling.rows, shape.head_dim) + padded(size));
  }

  /// Rows of several tokens.
  template <class A, class Source>
  static void attend_tiles(Context<cpu>& ctx, const AttentionShape& shape, const Tiling& tiling, Matrix<const A> q,
                           const Source& source, const Sequences& sequences, Matrix<A> out, Matrix<A> lse) {
    const Index head_dim = shape.head_dim, R = tiling.rows;
    ArenaScope scope(ctx.arena());
    const Matrix<A> memory = tile_scratch<A, typename Source::type>(ctx, shape, tiling);
    const Index tasks_per_tile = sequences.rows * shape.kv_heads;
    ctx.parallel_for(tiling.per_row * tasks_per_tile, [&](Index task, int worker) {
      // Last tiles first: they see the most keys, and short tasks at the end keep the threads even.
      const Index first = (tiling.per_row - 1 - task / tasks_per_tile) * tiling.tokens;
      const Index row = task % tasks_per_tile / shape.kv_heads, kv_head = task % shape.kv_heads;
      const Index length = sequences.length(row);
      if (first >= length || length == 1) return;
      const Tile tile{sequences.begin(row) + first, std::min(tiling.tokens, length - first), tiling.group,
                      kv_head * tiling.group, head_dim};
      const auto keys = source(row, kv_head * head_dim);
      A* products = memory[worker].data;
      A* queries = products + products_of<A>(R, head_dim);  // (R, head_dim), times scale
      A* sums = queries + R * head_dim;                     // (R, head_dim): of exp(score - maximum) * v
      A* scores = sums + R * head_dim;                      // (R, key_tile), then their exponentials
      A* maxima = scores + R * key_tile;                    // (R)
      A* totals = maxima + R;                               // (R): of exp(score - maximum)
      A* block_scratch = totals + R;                        // (key_tile, head_dim)
      tile.gather(q, static_cast<A>(shape.scale), queries);
      std::fill_n(sums, tile.rows() * head_dim, A(0));
      std::fill_n(maxima, tile.rows(), std::numeric_limits<A>::lowest());
      std::fill_n(totals, tile.rows(), A(0));
      const Matrix<A> x(queries, tile.rows(), head_dim), o(sums, tile.rows(), head_dim);
      const Index end = keys.past + first + tile.tokens;
      for (Index j = 0; j < end; j += key_tile) {
        const Index n = std::min(key_tile, end - j);
        const Matrix<A> s = strided(scores, tile.rows(), n, key_tile);
        const auto k = block(keys.k + j * keys.k_stride, keys.k_stride, n, head_dim, block_scratch);
        kernel::set_product(s, x, kernel::transposed(k), products);
        soften(tile, keys.past + first - j, n, scores, sums, maxima, totals);
        const auto v = block(keys.v + j * keys.v_stride, keys.v_stride, n, head_dim, block_scratch);
        kernel::add_product(o, s, v, products);
      }
      for (Index r = 0; r < tile.rows(); ++r) {
        const Index token = tile.token + r / tile.group, head = tile.head + r % tile.group;
        lse(token, head) = maxima[r] + std::log(totals[r]);
        kernel::scale(sums + r * head_dim, A(1) / totals[r], head_dim, &out(token, head * head_dim));
      }
    });
  }

  /// Scores of a block become exponentials relative to the running maximum; what was summed before is rescaled to it.
  /// position: of the tile's first token, counted from the block's first key.
  template <class A>
  static void soften(const Tile& tile, Index position, Index n, A* scores, A* sums, A* maxima, A* totals) {
    for (Index r = 0; r < tile.rows(); ++r) {
      A* s = scores + r * key_tile;
      const Index visible = std::clamp(position + r / tile.group + 1, Index{0}, n);
      std::fill(s + visible, s + n, A(0));
      if (visible == 0) continue;
      const A before = maxima[r], maximum = std::max(before, kernel::largest(s, visible));
      if (maximum != before) {
        const A factor = std::exp(before - maximum);
        totals[r] *= factor;
        kernel::scale(sums + r * tile.head_dim, factor, tile.head_dim, sums + r * tile.head_dim);
        maxima[r] = maximum;
      }
      totals[r] += kernel::exponentials(s, maximum, visible);
    }
  }

  /// One task a row and key head, so every gradient of a key or value has one writer.
  template <class A, class Source>
  static void differentiate(Context<cpu>& ctx, const AttentionShape& shape, const Backward<A>& at, const Source& source,
                            const Sequences& sequences) {
    static_assert(std::is_same_v<A, compute_t<A>>, "zamba: on the CPU activations are of the compute type");
    const Tiling tiling(shape, sequences);
    const Index head_dim = shape.head_dim, R = tiling.rows;
    const Index converted = std::is_same_v<A, typename Source::type> ? 0 : 2 * key_tile * head_dim;
    ArenaScope scope(ctx.arena());
    auto scratch = ctx.arena().template tensor<A>(
        Index{ctx.threads()}, products_of<A>(R, head_dim) + padded(R * (3 * head_dim + 2 * key_tile + 2) + converted));
    ctx.parallel_for(sequences.rows * shape.kv_heads, [&](Index task, int worker) {
      const Index row = task / shape.kv_heads, kv_head = task % shape.kv_heads, column = kv_head * head_dim;
      const Index length = sequences.length(row), begin = sequences.begin(row);
      if (length == 0) return;
      const auto keys = source(row, column);
      take(at.d_cache_k, row, keys.past, column, at.d_k.slice(begin, length).columns(column, head_dim));
      take(at.d_cache_v, row, keys.past, column, at.d_v.slice(begin, length).columns(column, head_dim));
      for (Index first = 0; first < length; first += tiling.tokens) {
        const Tile tile{begin + first, std::min(tiling.tokens, length - first), tiling.group, kv_head * tiling.group,
                        head_dim};
        BackwardTile<A> work(scratch[worker].data, tile, tiling.rows);
        work.load(shape, at);
        // Blocks end at the row's first token: gradients of what lies before go to the cache, of the rest to d_k, d_v.
        const Index end = keys.past + first + tile.tokens;
        for (Index j = 0, n; j < end; j += n) {
          const bool past = j < keys.past;
          n = std::min(key_tile, (past ? keys.past : end) - j);
          A *d_k = nullptr, *d_v = nullptr;
          if (!past) {
            d_k = &at.d_k(begin + j - keys.past, column);
            d_v = &at.d_v(begin + j - keys.past, column);
          } else if (at.d_cache_k) {
            d_k = &at.d_cache_k(row, j, column);
            d_v = &at.d_cache_v(row, j, column);
          }
          work.accumulate(keys, j, n, keys.past + first - j, d_k, past ? at.d_cache_k.stride[1] : at.d_k.stride[0], d_v,
                          past ? at.d_cache_v.stride[1] : at.d_v.stride[0]);
        }
        for (Index t = 0; t < tile.tokens; ++t)
          kernel::scale(work.d_q + t * tile.group * head_dim, static_cast<A>(shape.scale), tile.group * head_dim,
                        &at.d_q(tile.token + t, tile.column()));
      }
    });
  }

  /// gradient (length, head_dim) begins with that of the row's own positions in the final cache, which are then zero.
  template <class A>
  static void take(Tensor<A, 3> d_cache, Index row, Index past, Index column, Matrix<A> gradient) {
    for (Index t = 0; t < gradient.rows(); ++t) {
      A* to = &gradient(t, 0);
      A* from = d_cache ? &d_cache(row, past + t, column) : nullptr;
      if (from) std::copy_n(from, gradient.cols(), to);
      std::fill_n(from ? from : to, gradient.cols(), A(0));
    }
  }

  /// A tile of queries in the backward pass, and its scratch.
  template <class A>
  struct BackwardTile {
    const Tile& tile;
    A *products, *q, *d_out, *d_q, *p, *d_s, *lse, *dots, *k_scratch, *v_scratch;

    BackwardTile(A* memory, const Tile& of, Index R)
        : tile(of),
          products(memory),
          q(products + products_of<A>(R, tile.head_dim)),  // (R, head_dim), times scale
          d_out(q + R * tile.head_dim),                    // (R, head_dim)
          d_q(d_out + R * tile.head_dim),                  // (R, head_dim), over scale
          p(d_q + R * tile.head_dim),                      // (R, key_tile)
          d_s(p + R * key_tile),                           // (R, key_tile)
          lse(d_s + R * key_tile),                         // (R)
          dots(lse + R),                                   // (R): d_out . out
          k_scratch(dots + R),                             // (key_tile, head_dim)
          v_scratch(k_scratch + key_tile * tile.head_dim) {}

    void load(const AttentionShape& shape, const Backward<A>& at) {
      tile.gather(at.q, static_cast<A>(shape.scale), q);
      tile.gather(at.d_out, A(1), d_out);
      std::fill_n(d_q, tile.rows() * tile.head_dim, A(0));
      for (Index r = 0; r < tile.rows(); ++r) {
        const Index token = tile.token + r / tile.group, head = tile.head + r % tile.group;
        lse[r] = at.lse(token, head);
        const A *dy = d_out + r * tile.head_dim, *y = &at.out(token, head * tile.head_dim);
        Pack<A> sum = kernel::zeros<A>();
        kernel::for_packs<A>(tile.head_dim,
                             [&](Index c, auto n) { sum += kernel::load(dy + c, n) * kernel::load(y + c, n); });
        dots[r] = kernel::sum<A>(sum);
      }
    }

    /// Adds the share of n keys from j to d_q, and to d_k and d_v where given; position as in soften.
    template <class S>
    void accumulate(const Keys<S>& keys, Index j, Index n, Index position, A* d_k, Index d_k_stride, A* d_v,
                    Index d_v_stride) {
      const Index rows = tile.rows(), head_dim = tile.head_dim;
      const auto k = block<A>(keys.k + j * keys.k_stride, keys.k_stride, n, head_dim, k_scratch);
      const auto v = block<A>(keys.v + j * keys.v_stride, keys.v_stride, n, head_dim, v_scratch);
      const Matrix<A> x(q, rows, head_dim), dy(d_out, rows, head_dim), d_x(d_q, rows, head_dim);
      const Matrix<A> probabilities = strided(p, rows, n, key_tile), scores = strided(d_s, rows, n, key_tile);
      kernel::set_product(probabilities, x, kernel::transposed(k), products);
      kernel::set_product(scores, dy, kernel::transposed(v), products);
      for (Index r = 0; r < rows; ++r) {
        A *p_r = p + r * key_tile, *s_r = d_s + r * key_tile;
        const Index visible = std::clamp(position + r / tile.group + 1, Index{0}, n);
        kernel::for_packs<A>(visible, [&](Index c, auto count) {
          const Pack<A> e = kernel::exp<A>(kernel::load(p_r + c, count) - lse[r]);
          kernel::store(p_r + c, e, count);
          kernel::store(s_r + c, Pack<A>(e * (kernel::load(s_r + c, count) - dots[r])), count);
        });
        std::fill(p_r + visible, p_r + n, A(0));
        std::fill(s_r + visible, s_r + n, A(0));
      }
      kernel::add_product(d_x, scores, k, products);
      if (!d_k) return;
      kernel::add_product(strided(d_k, n, head_dim, d_k_stride), kernel::transposed(scores), x, products);
      kernel::add_product(strided(d_v, n, head_dim, d_v_stride), kernel::transposed(probabilities), dy, products);
    }
  };
};

}  // namespace zamba
