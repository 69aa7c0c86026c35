// SPDX-License-Identifier: MIT
// The backward pass of attention of any type and head size: 16 queries and 16 keys at a time, without tensor cores.
//
// A thread computes the score and the probability of one pair of them, then the sums of up to two dimensions for all
// 16. The pairs' products go over slabs of dimensions in shared memory; the sums read rows from the caches of the GPU.
// Numeric contract: all in compute_t, dimensions, then keys or queries in order.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/ops/attention/backward_tile.cuh>

namespace zamba::kernel {

/// Activations of A_, keys of S_.
template <class A_, class S_>
struct AttentionBackwardTraits {
  using A = A_;
  using S = S_;
  using F = compute_t<A>;
  static constexpr int tile = 16, threads = tile * tile, slab = 32;
  static constexpr int columns = 2;  // of a thread, `threads` apart

  using Sums = F[tile][columns];
};

/// A tile of queries with its keys: P and dS.
template <class Traits>
struct PairTile {
  using A = typename Traits::A;
  using S = typename Traits::S;
  using F = typename Traits::F;
  static constexpr int tile = Traits::tile, slab = Traits::slab;
  F p[tile][tile], d_s[tile][tile];  // (queries, keys)
  F q[tile][slab + 1], d_out[tile][slab + 1], k[tile][slab + 1], v[tile][slab + 1];

  static __device__ int query() { return static_cast<int>(threadIdx.x) / tile; }
  static __device__ int key() { return static_cast<int>(threadIdx.x) % tile; }

  template <class T>
  static __device__ F element(const TileRows<T>& rows, int r, int d, int head_dim) {
    return r < rows.count && d < head_dim ? F(rows.first[r * rows.stride + d]) : F(0);
  }

  /// lse, dot: of this thread's query; visible: whether it sees this thread's key.
  __device__ void compute(const TileRows<A>& of_q, const TileRows<A>& of_d_out, const TileRows<S>& of_k,
                          const TileRows<S>& of_v, int head_dim, F scale, F lse, F dot, bool visible) {
    F score = 0, d_p = 0;
    for (int first = 0; first < head_dim; first += slab) {
      __syncthreads();  // what was there has been read
      for (int i = threadIdx.x; i < tile * slab; i += Traits::threads) {
        const int r = i / slab, d = i % slab;
        q[r][d] = element(of_q, r, first + d, head_dim);
        d_out[r][d] = element(of_d_out, r, first + d, head_dim);
        k[r][d] = element(of_k, r, first + d, head_dim);
        v[r][d] = element(of_v, r, first + d, head_dim);
      }
      __syncthreads();
      for (int d = 0; d < slab; ++d) {
        score += q[query()][d] * k[key()][d];
        d_p += d_out[query()][d] * v[key()][d];
      }
    }
    const F e = visible ? ::exp(scale * score - lse) : F(0);
    p[query()][key()] = e;
    d_s[query()][key()] = e * (d_p - dot);
    __syncthreads();
  }
};

/// sums of rows r: += weight(r) * x in this thread's column c.
template <class Traits, class Weight>
__device__ __forceinline__ void add_column(typename Traits::Sums& sums, int c, typename Traits::F x, Weight&& weight) {
#pragma unroll
  for (int r = 0; r < Traits::tile; ++r) sums[r][c] += weight(r) * x;
}

/// d_k and d_v of a tile of keys: the heads of their group in order, and of each the queries that see them.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_key_gradient_kernel(AttentionShape shape, AttentionBackwardTensors<typename Traits::A> at,
                                  AttentionKeys<typename Traits::S> source, Sequences sequences) {
  using A = typename Traits::A;
  using S = typename Traits::S;
  using F = typename Traits::F;
  using Pairs = PairTile<Traits>;
  __shared__ Pairs pairs;
  launch_dependents();
  grid_dependency_wait();
  const auto tile = KeyTile<Traits::tile>::of_block(shape, source, sequences, bool(at.d_k.cache));
  if (tile.keys == 0) return;
  const int head_dim = static_cast<int>(shape.head_dim), group = static_cast<int>(shape.heads / shape.kv_heads);
  const Index column = Index{tile.kv_head} * head_dim, k_stride = source.k.stride[1], v_stride = source.v.stride[1];
  const TileRows<S> k{source.key(tile.of.row, tile.of.begin) + tile.first * k_stride + column, k_stride, tile.keys};
  const TileRows<S> v{source.value(tile.of.row, tile.of.begin) + tile.first * v_stride + column, v_stride, tile.keys};
  typename Traits::Sums d_k = {}, d_v = {};
  for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head)
    for (int first = tile.first_query(); first < tile.of.tokens; first += Traits::tile) {
      const int queries = ::min(Traits::tile, tile.of.tokens - first), own = ::min(Pairs::query(), queries - 1);
      const Index token = tile.of.begin + first, of_head = Index{head} * head_dim;
      const TileRows<A> q{&at.q(token, of_head), at.q.stride[0], queries};
      const TileRows<A> d_out{&at.d_out(token, of_head), at.d_out.stride[0], queries};
      const bool visible = Pairs::query() < queries && Pairs::key() < tile.keys &&
                           tile.first + Pairs::key() <= tile.of.past + first + Pairs::query();
      pairs.compute(q, d_out, k, v, head_dim, F(shape.scale), at.sums(0, head, token + own),
                    at.sums(1, head, token + own), visible);
      for (int i = 0; i < queries; ++i)
#pragma unroll
        for (int c = 0; c < Traits::columns; ++c) {
          const int d = static_cast<int>(threadIdx.x) + c * Traits::threads;
          if (d >= head_dim) continue;
          add_column<Traits>(d_v, c, F(d_out.first[i * d_out.stride + d]), [&](int j) { return pairs.p[i][j]; });
          add_column<Traits>(d_k, c, F(q.first[i * q.stride + d]), [&](int j) { return pairs.d_s[i][j]; });
        }
    }
#pragma unroll
  for (int c = 0; c < Traits::columns; ++c)
#pragma unroll
    for (int j = 0; j < Traits::tile; ++j) {
      const int d = static_cast<int>(threadIdx.x) + c * Traits::threads;
      if (d >= head_dim || j >= tile.keys) continue;
      tile.put(at.d_k, j, column + d, F(shape.scale) * d_k[j][c]);
      tile.put(at.d_v, j, column + d, d_v[j][c]);
    }
}

/// d_q of a tile of queries of one head.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_query_gradient_kernel(AttentionShape shape, AttentionBackwardTensors<typename Traits::A> at,
                                    AttentionKeys<typename Traits::S> source, Sequences sequences) {
  using A = typename Traits::A;
  using S = typename Traits::S;
  using F = typename Traits::F;
  using Pairs = PairTile<Traits>;
  __shared__ Pairs pairs;
  launch_dependents();
  grid_dependency_wait();
  const int heads = static_cast<int>(shape.heads), head_dim = static_cast<int>(shape.head_dim);
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x), head = block % heads;
  const auto place = TilePlace::of<Traits::tile>(sequences, block / heads);
  const AttendingRow row(sequences, place.row, source.cached);
  const int first = static_cast<int>(place.first), queries = ::min(Traits::tile, row.tokens - first);
  if (queries <= 0) return;
  const int own = ::min(Pairs::query(), queries - 1), position = row.past + first;
  const Index token = row.begin + first, of_head = Index{head} * head_dim;
  const Index column = head / (shape.heads / shape.kv_heads) * head_dim;
  const Index k_stride = source.k.stride[1], v_stride = source.v.stride[1];
  const TileRows<A> q{&at.q(token, of_head), at.q.stride[0], queries};
  const TileRows<A> d_out{&at.d_out(token, of_head), at.d_out.stride[0], queries};
  const F lse = at.sums(0, head, token + own), dot = at.sums(1, head, token + own);
  typename Traits::Sums d_q = {};
  for (int j0 = 0; j0 < position + queries; j0 += Traits::tile) {
    const int keys = ::min(Traits::tile, position + queries - j0);
    const TileRows<S> k{source.key(row.row, row.begin) + j0 * k_stride + column, k_stride, keys};
    const TileRows<S> v{source.value(row.row, row.begin) + j0 * v_stride + column, v_stride, keys};
    const bool visible = Pairs::query() < queries && j0 + Pairs::key() <= position + Pairs::query();
    pairs.compute(q, d_out, k, v, head_dim, F(shape.scale), lse, dot, visible);
    for (int j = 0; j < keys; ++j)
#pragma unroll
      for (int c = 0; c < Traits::columns; ++c)
        if (const int d = static_cast<int>(threadIdx.x) + c * Traits::threads; d < head_dim)
          add_column<Traits>(d_q, c, F(k.first[j * k_stride + d]), [&](int i) { return pairs.d_s[i][j]; });
  }
#pragma unroll
  for (int c = 0; c < Traits::columns; ++c)
#pragma unroll
    for (int i = 0; i < Traits::tile; ++i)
      if (const int d = static_cast<int>(threadIdx.x) + c * Traits::threads; d < head_dim && i < queries)
        at.d_q(token + i, of_head + d) = A(F(shape.scale) * d_q[i][c]);
}

/// What fits any head of at most `most_dimensions`, and its launch.
struct PlainAttentionBackward {
  static constexpr Index most_dimensions =
      AttentionBackwardTraits<float, float>::columns * AttentionBackwardTraits<float, float>::threads;

  template <class A, class S>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, const AttentionBackwardTensors<A>& at,
                     const AttentionKeys<S>& source, const Sequences& sequences) {
    using Traits = AttentionBackwardTraits<A, S>;
    const auto overlap = overlap_for(sequences.tokens);
    kernel::launch(ctx, overlap, "attention: gradients of keys", attention_key_gradient_kernel<Traits>,
                   KeyTile<Traits::tile>::blocks(shape, source, sequences), Traits::threads, 0, shape, at, source,
                   sequences);
    const Index tiles = sequences.tokens / Traits::tile + sequences.rows;
    kernel::launch(ctx, overlap, "attention: gradients of queries", attention_query_gradient_kernel<Traits>,
                   static_cast<unsigned>(tiles * shape.heads), Traits::threads, 0, shape, at, source, sequences);
  }
};

}  // namespace zamba::kernel
