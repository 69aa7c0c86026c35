// SPDX-License-Identifier: MIT
// attention on CUDA, forward; equations and shapes in attention.hpp.
//
// A block takes one token and one head; its warps share the keys, each with a running softmax of its own, and the
// lanes share the head's dimensions. Rows of few tokens split their keys further, into parts of fixed size, whose
// results a second kernel joins: a single token over a long cache fills the machine.
//
// Numeric contract: scores, softmax and sums in compute_t; keys in an order fixed by their positions alone, so a rerun
// is bit-equal and nothing depends on the rest of the batch. Rounded once when written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/detail/block_sum.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/attention.hpp>

namespace zamba {

namespace detail {

/// Keys and values of a row: its own tokens, or a cache.
template <class S_>
struct AttentionKeys {
  using S = S_;
  Tensor<const S, 3> k, v;  // (rows, positions, width), or (1, tokens, width) of all rows
  bool cached;

  __device__ const S* key(Index row, Index first, Index j) const {
    return cached ? &k(row, j, 0) : &k(0, first + j, 0);
  }
  __device__ const S* value(Index row, Index first, Index j) const {
    return cached ? &v(row, j, 0) : &v(0, first + j, 0);
  }
};

/// Activations of A_, keys of S_; lane l holds pieces l, l + 32, ... of a head, Pieces_ of them, of Width_ dimensions.
template <class A_, class S_, int Width_, int Pieces_>
struct AttentionTraits {
  using A = A_;
  using S = S_;
  using F = compute_t<A>;
  static constexpr int width = Width_, pieces = Pieces_;
  static constexpr int warps = 4, threads = 32 * warps;
  static constexpr int at_once = 4;        // keys of a warp whose loads are in flight together
  static constexpr Index split_keys = 64;  // of a part, where keys are split
};

/// A running softmax: the greatest score, the sum of exponentials, and the weighted sum of values in the lanes.
template <class Traits>
struct Softmax {
  using F = typename Traits::F;
  F greatest = -INFINITY, total = 0, sum[Traits::pieces][Traits::width] = {};

  /// Scores of -infinity are of no key; the first is of one. value(b): where the values of key b are.
  template <class Value>
  __device__ void add(const F (&scores)[Traits::at_once], Value&& value, int lane, int head_dim) {
    F next = greatest, weights[Traits::at_once];
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) next = ::max(next, scores[b]);
    const F shrink = ::exp(greatest - next);
    greatest = next;
    total *= shrink;
#pragma unroll
    for (int p = 0; p < Traits::pieces; ++p)
#pragma unroll
      for (int i = 0; i < Traits::width; ++i) sum[p][i] *= shrink;
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) {
      weights[b] = ::exp(scores[b] - next);
      total += weights[b];
    }
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) {
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p) {
        const int d = (32 * p + lane) * Traits::width;
        if (d >= head_dim) continue;
        F values[Traits::width];
        load_piece<Traits::width>(value(b) + d, values);
#pragma unroll
        for (int i = 0; i < Traits::width; ++i) sum[p][i] += weights[b] * values[i];
      }
    }
  }
};

/// parts (splits, tokens, heads, head_dim + 2), where keys are split: sum, greatest and total of each part. Otherwise
/// out and lse are written.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_kernel(AttentionShape shape, Matrix<const typename Traits::A> q, AttentionKeys<typename Traits::S> keys,
                     Sequences sequences, Matrix<typename Traits::A> out, Matrix<typename Traits::F> lse,
                     Tensor<typename Traits::F, 4> parts) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  extern __shared__ char shared[];
  F* of_warps = reinterpret_cast<F*>(shared);  // (warps, head_dim + 2)
  const Index t = blockIdx.x, head = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head_dim = static_cast<int>(shape.head_dim);
  const Index row = row_of(sequences, t), first = sequences.begin(row);
  const Index last = t - first + (keys.cached ? sequences.start(row) : 0);  // the position of this token
  const Index column = head / (shape.heads / shape.kv_heads) * head_dim;
  const Index begin = parts ? Index{blockIdx.z} * Traits::split_keys : 0;
  const Index end = parts ? ::min(begin + Traits::split_keys, last + 1) : last + 1;
  if (begin >= end) return;

  F query[Traits::pieces][Traits::width];
#pragma unroll
  for (int p = 0; p < Traits::pieces; ++p)
#pragma unroll
    for (int i = 0; i < Traits::width; ++i) {
      const int d = (32 * p + lane) * Traits::width + i;
      query[p][i] = d < head_dim ? F(q(t, head * head_dim + d)) * F(shape.scale) : F(0);
    }

  Softmax<Traits> softmax;
  for (Index j = begin + warp * Traits::at_once; j < end; j += Traits::warps * Traits::at_once) {
    F scores[Traits::at_once] = {};
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) {
      const auto* key = keys.key(row, first, ::min(j + b, end - 1)) + column;
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p) {
        const int d = (32 * p + lane) * Traits::width;
        if (d >= head_dim) continue;
        F values[Traits::width];
        load_piece<Traits::width>(key + d, values);
#pragma unroll
        for (int i = 0; i < Traits::width; ++i) scores[b] += query[p][i] * values[i];
      }
    }
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) {
      for (int distance = 16; distance > 0; distance /= 2)
        scores[b] += __shfl_xor_sync(0xffffffffu, scores[b], distance);
      if (j + b >= end) scores[b] = -INFINITY;
    }
    softmax.add(
        scores, [&](int b) { return keys.value(row, first, ::min(j + b, end - 1)) + column; }, lane, head_dim);
  }

  const int stride = head_dim + 2;
#pragma unroll
  for (int p = 0; p < Traits::pieces; ++p)
#pragma unroll
    for (int i = 0; i < Traits::width; ++i) {
      const int d = (32 * p + lane) * Traits::width + i;
      if (d < head_dim) of_warps[warp * stride + d] = softmax.sum[p][i];
    }
  if (lane == 0) {
    of_warps[warp * stride + head_dim] = softmax.greatest;
    of_warps[warp * stride + head_dim + 1] = softmax.total;
  }
  __syncthreads();
  F greatest = -INFINITY, total = 0, scale[Traits::warps];
#pragma unroll
  for (int w = 0; w < Traits::warps; ++w) greatest = ::max(greatest, of_warps[w * stride + head_dim]);
#pragma unroll
  for (int w = 0; w < Traits::warps; ++w) {
    scale[w] = ::exp(of_warps[w * stride + head_dim] - greatest);
    total += scale[w] * of_warps[w * stride + head_dim + 1];
  }
  for (int d = threadIdx.x; d < head_dim; d += Traits::threads) {
    F sum = 0;
#pragma unroll
    for (int w = 0; w < Traits::warps; ++w) sum += scale[w] * of_warps[w * stride + d];
    if (parts)
      parts(Index{blockIdx.z}, t, head, d) = sum;
    else
      out(t, head * head_dim + d) = A(sum / total);
  }
  if (threadIdx.x != 0) return;
  if (parts) {
    parts(Index{blockIdx.z}, t, head, head_dim) = greatest;
    parts(Index{blockIdx.z}, t, head, head_dim + 1) = total;
  } else {
    lse(t, head) = greatest + ::log(total);
  }
}

/// Joins the parts of a token and head, in order.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_join_kernel(AttentionShape shape, Sequences sequences, bool cached,
                          Tensor<const typename Traits::F, 4> parts, Matrix<typename Traits::A> out,
                          Matrix<typename Traits::F> lse) {
  using F = typename Traits::F;
  const Index t = blockIdx.x, head = blockIdx.y, head_dim = shape.head_dim;
  const Index row = row_of(sequences, t);
  const Index last = t - sequences.begin(row) + (cached ? sequences.start(row) : 0);
  const Index splits = last / Traits::split_keys + 1;
  F greatest = -INFINITY, total = 0;
  for (Index s = threadIdx.x; s < splits; s += Traits::threads) greatest = ::max(greatest, parts(s, t, head, head_dim));
  greatest = block_max<Traits::threads>(greatest);
  for (Index s = threadIdx.x; s < splits; s += Traits::threads)
    total += ::exp(parts(s, t, head, head_dim) - greatest) * parts(s, t, head, head_dim + 1);
  total = block_sum<Traits::threads>(total);
  for (Index d = threadIdx.x; d < head_dim; d += Traits::threads) {
    F sum = 0;
#pragma unroll 8
    for (Index s = 0; s < splits; ++s) sum += ::exp(parts(s, t, head, head_dim) - greatest) * parts(s, t, head, d);
    out(t, head * head_dim + d) = typename Traits::A(sum / total);
  }
  if (threadIdx.x == 0) lse(t, head) = greatest + ::log(total);
}

/// Puts a token's keys or values at its position of the cache.
template <class A, class S>
struct AppendElement {
  Matrix<const A> x;
  Sequences sequences;
  Tensor<S, 3> cache;

  __device__ void operator()(Index t, Index c) const {
    const Index row = row_of(sequences, t);
    cache(row, sequences.start(row) + t - sequences.begin(row), c) = S(compute_t<A>(x(t, c)));
  }
};

}  // namespace detail

template <>
struct Attention<cuda> {
  template <class A, class S, class F>
  static void forward(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q, Matrix<const A> k,
                      Matrix<const A> v, const Sequences& sequences, Tensor<S, 3> cache_k, Tensor<S, 3> cache_v,
                      Matrix<A> out, Matrix<F> lse) {
    if (sequences.tokens == 0) return;
    require(shape.head_dim <= most_dimensions, "attention: on CUDA head_dim is at most ", most_dimensions, ", got ",
            shape.head_dim);
    if (!cache_k)
      return choose(ctx, shape, q, detail::AttentionKeys<A>{of_all(k), of_all(v), false}, sequences, out, lse);
    detail::for_elements(ctx, k.rows(), k.cols(), detail::AppendElement<A, S>{k, sequences, cache_k},
                         "attention: keys");
    detail::for_elements(ctx, v.rows(), v.cols(), detail::AppendElement<A, S>{v, sequences, cache_v},
                         "attention: values");
    choose(ctx, shape, q, detail::AttentionKeys<S>{cache_k, cache_v, true}, sequences, out, lse);
  }

 private:
  /// Rows of at most so many tokens split their keys.
  static constexpr Index few_tokens = 8;
  static constexpr Index most_dimensions = 512;

  template <class A>
  static Tensor<const A, 3> of_all(Matrix<const A> m) {
    Tensor<const A, 3> all(m.data, 1, m.rows(), m.cols());
    all.stride[1] = m.stride[0];
    return all;
  }

  template <class A, class S, class F>
  static void choose(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const detail::AttentionKeys<S>& keys, const Sequences& sequences, Matrix<A> out, Matrix<F> lse) {
    constexpr int wide = detail::wide<S>;
    const bool in_pieces = shape.head_dim % wide == 0 && starts_pieces(keys.k) && starts_pieces(keys.v);
    if (in_pieces)
      launch_pieces<wide, 1>(ctx, shape, q, keys, sequences, out, lse);
    else
      launch_pieces<1, 2>(ctx, shape, q, keys, sequences, out, lse);
  }

  /// Whether every position begins at a multiple of 16 bytes.
  template <class S>
  static bool starts_pieces(Tensor<const S, 3> keys) {
    return reinterpret_cast<std::uintptr_t>(keys.data) % 16 == 0 && keys.stride[0] % detail::wide<S> == 0 &&
           keys.stride[1] % detail::wide<S> == 0;
  }

  /// With as many pieces a lane as a head needs.
  template <int Width, int Pieces, class A, class S, class F>
  static void launch_pieces(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                            const detail::AttentionKeys<S>& keys, const Sequences& sequences, Matrix<A> out,
                            Matrix<F> lse) {
    if constexpr (32 * Width * Pieces < most_dimensions)
      if (shape.head_dim > 32 * Width * Pieces)
        return launch_pieces<Width, 2 * Pieces>(ctx, shape, q, keys, sequences, out, lse);
    launch<detail::AttentionTraits<A, S, Width, Pieces>>(ctx, shape, q, keys, sequences, out, lse);
  }

  template <class Traits, class A, class S, class F>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const detail::AttentionKeys<S>& keys, const Sequences& sequences, Matrix<A> out, Matrix<F> lse) {
    const std::size_t shared = static_cast<std::size_t>(Traits::warps * (shape.head_dim + 2)) * sizeof(F);
    const auto tokens = static_cast<unsigned>(sequences.tokens), heads = static_cast<unsigned>(shape.heads);
    const Index positions = keys.k.shape[1];
    const Index splits =
        sequences.longest <= few_tokens ? (positions + Traits::split_keys - 1) / Traits::split_keys : 1;
    ArenaScope scope(ctx.arena());
    Tensor<F, 4> parts;
    if (splits > 1) parts = ctx.arena().template tensor<F>(splits, sequences.tokens, shape.heads, shape.head_dim + 2);
    detail::attention_kernel<Traits>
        <<<dim3(tokens, heads, static_cast<unsigned>(splits)), Traits::threads, shared, ctx.stream()>>>(
            shape, q, keys, sequences, out, lse, parts);
    detail::check_launch("attention");
    if (splits == 1) return;
    detail::attention_join_kernel<Traits>
        <<<dim3(tokens, heads), Traits::threads, 0, ctx.stream()>>>(shape, sequences, keys.cached, parts, out, lse);
    detail::check_launch("attention: join");
  }
};

}  // namespace zamba
