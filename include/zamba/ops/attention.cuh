// SPDX-License-Identifier: MIT
// attention on CUDA, forward; equations and shapes in attention.hpp.
//
// Rows of few tokens over a cache go at the pace of memory: a block takes one token, up to four heads that share keys,
// and a part of the keys; teams of lanes take turns at them, each with a running softmax of its own, and the lanes of a
// team share the head's dimensions. The block of a token that finishes last joins the parts, in order. The number of
// parts is bounded, so the grid does not depend on how long a cache may become. Longer rows of bf16 go through tensor
// cores (detail/attention_warpgroups.cuh, detail/attention_tiles.cuh); of other types, or where rows do not start at
// multiples of 16 bytes, through the kernel for few tokens with one part.
//
// Numeric contract: scores, softmax and sums in compute_t; which way a row goes, its parts and the order of its keys
// follow from the row alone, so a rerun is bit-equal and nothing depends on the rest of the batch. Rounded once when
// written; on tensor cores the probabilities are rounded to bf16 too.
#pragma once

#include <cstring>

#include <zamba/context.cuh>
#include <zamba/detail/attention_tiles.cuh>
#include <zamba/detail/attention_warpgroups.cuh>
#include <zamba/detail/block_sum.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/attention.hpp>

namespace zamba {

namespace detail {

/// Activations of A_, keys of S_, Heads_ of a token together. Teams of Lanes_ lanes: lane l holds pieces l, l + Lanes_,
/// ... of a head, Pieces_ of them, of Width_ dimensions.
template <class A_, class S_, int Heads_, int Lanes_, int Width_, int Pieces_>
struct AttentionTraits {
  using A = A_;
  using S = S_;
  using F = compute_t<A>;
  static constexpr int heads = Heads_, lanes = Lanes_, width = Width_, pieces = Pieces_;
  static constexpr int threads = 128, teams = threads / lanes;
  static constexpr int at_once = 4;      // keys of a team whose loads are in flight together
  static constexpr int least_keys = 64;  // of a part, and its sizes are multiples of it
  static constexpr int most_parts = 32;
  static_assert(32 % lanes == 0 && most_parts <= threads);
};

/// A running softmax of one head: the greatest score, the sum of exponentials, and the weighted sum of values in the
/// lanes.
template <class Traits>
struct Softmax {
  using F = typename Traits::F;
  F greatest = -INFINITY, total = 0, sum[Traits::pieces][Traits::width] = {};

  /// The weights of keys by their scores; those of -infinity are of none.
  __device__ void add(const F (&scores)[Traits::at_once], F (&weights)[Traits::at_once]) {
    F next = greatest;
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) next = ::max(next, scores[b]);
    const F shrink = greatest == next ? F(1) : ::exp(greatest - next);  // also where there was no key yet
    greatest = next;
    total *= shrink;
#pragma unroll
    for (int p = 0; p < Traits::pieces; ++p)
#pragma unroll
      for (int i = 0; i < Traits::width; ++i) sum[p][i] *= shrink;
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) {
      weights[b] = scores[b] == -INFINITY ? F(0) : ::exp(scores[b] - next);
      total += weights[b];
    }
  }
};

/// Which tokens the blocks of a launch are for: place i is token i % per_row of row i / per_row, or token i of the
/// batch where per_row is 0.
struct AttentionPlaces {
  Index per_row;
  AttentionRows rows;
};

/// What the blocks of a token leave for the last of them.
template <class F>
struct AttentionParts {
  Tensor<F, 4> sums;  // (parts, places, heads, head_dim + 2): sum, greatest and total; none: there is one part
  unsigned* arrived;  // (places, blocks across), zeros at first
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_kernel(AttentionShape shape, Matrix<const typename Traits::A> q, AttentionKeys<typename Traits::S> keys,
                     Sequences sequences, AttentionPlaces places, AttentionParts<typename Traits::F> parts,
                     Matrix<typename Traits::A> out, Matrix<typename Traits::F> lse) {
  using A = typename Traits::A;
  using S = typename Traits::S;
  using F = typename Traits::F;
  constexpr int heads = Traits::heads, lanes = Traits::lanes, teams = Traits::teams, at_once = Traits::at_once;
  extern __shared__ char shared[];
  F* of_teams = reinterpret_cast<F*>(shared);  // (teams, heads, head_dim + 2), then the parts' weights and totals
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes, head_dim = static_cast<int>(shape.head_dim);

  const Index place = blockIdx.x;
  const Index row = places.per_row ? place / places.per_row : row_of(sequences, place);
  const Index begin = sequences.begin(row), length = sequences.length(row);
  const Index t = places.per_row ? begin + place % places.per_row : place;
  if (t - begin >= length || !places.rows.have(length)) return;
  const int group = static_cast<int>(shape.heads / shape.kv_heads), across = (group + heads - 1) / heads;
  const int kv_head = blockIdx.y / across, in_group = blockIdx.y % across * heads;
  const Index head = Index{kv_head} * group + in_group;
  const int count = ::min(heads, group - in_group);

  const int visible = static_cast<int>(t - begin + (keys.cached ? sequences.start(row) : 0)) + 1;
  int part = visible, part_count = 1;
  if (parts.sums) {
    constexpr int most = Traits::least_keys * Traits::most_parts;
    part = (visible + most - 1) / most * Traits::least_keys;
    part_count = (visible + part - 1) / part;
  }
  const int first = blockIdx.z * part, end = ::min(first + part, visible);
  if (first >= end) return;

  bool held[Traits::pieces];
  F query[heads][Traits::pieces][Traits::width];
#pragma unroll
  for (int p = 0; p < Traits::pieces; ++p) {
    const int d = (lanes * p + lane) * Traits::width;
    held[p] = d < head_dim;
#pragma unroll
    for (int h = 0; h < heads; ++h)
#pragma unroll
      for (int i = 0; i < Traits::width; ++i)
        query[h][p][i] = held[p] && h < count ? F(q(t, (head + h) * head_dim + d + i)) * F(shape.scale) : F(0);
  }

  Softmax<Traits> softmax[heads];
  const Index column = Index{kv_head} * head_dim + lane * Traits::width;
  const S* k = keys.key(row, begin) + column;
  const S* v = keys.value(row, begin) + column;
  for (int turn = first; turn < end; turn += teams * at_once) {
    const int j = turn + team * at_once;  // may be at or after the end
    Piece<Traits::width, S> key[at_once][Traits::pieces] = {}, value[at_once][Traits::pieces] = {};
#pragma unroll
    for (int b = 0; b < at_once; ++b)
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p)
        if (held[p])
          key[b][p] = piece_at<Traits::width>(k + ::min(j + b, end - 1) * keys.k.stride[1] + lanes * p * Traits::width);
#pragma unroll
    for (int b = 0; b < at_once; ++b)
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p)
        if (held[p])
          value[b][p] =
              piece_at<Traits::width>(v + ::min(j + b, end - 1) * keys.v.stride[1] + lanes * p * Traits::width);

    F scores[heads][at_once] = {};
#pragma unroll
    for (int b = 0; b < at_once; ++b)
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p) {
        F values[Traits::width];
        key[b][p].values(values);
#pragma unroll
        for (int h = 0; h < heads; ++h)
#pragma unroll
          for (int i = 0; i < Traits::width; ++i) scores[h][b] += query[h][p][i] * values[i];
      }
    F weights[heads][at_once];
#pragma unroll
    for (int h = 0; h < heads; ++h) {
#pragma unroll
      for (int b = 0; b < at_once; ++b) {
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2)
          scores[h][b] += __shfl_xor_sync(0xffffffffu, scores[h][b], distance);
        if (j + b >= end) scores[h][b] = -INFINITY;
      }
      softmax[h].add(scores[h], weights[h]);
    }
#pragma unroll
    for (int b = 0; b < at_once; ++b)
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p) {
        F values[Traits::width];
        value[b][p].values(values);
#pragma unroll
        for (int h = 0; h < heads; ++h)
#pragma unroll
          for (int i = 0; i < Traits::width; ++i) softmax[h].sum[p][i] += weights[h][b] * values[i];
      }
  }

  const int stride = head_dim + 2;
#pragma unroll
  for (int h = 0; h < heads; ++h) {
    F* of_head = of_teams + (team * heads + h) * stride;
#pragma unroll
    for (int p = 0; p < Traits::pieces; ++p)
#pragma unroll
      for (int i = 0; i < Traits::width; ++i)
        if (held[p]) of_head[(lanes * p + lane) * Traits::width + i] = softmax[h].sum[p][i];
    if (lane == 0) {
      of_head[head_dim] = softmax[h].greatest;
      of_head[head_dim + 1] = softmax[h].total;
    }
  }
  __syncthreads();
  for (int h = 0; h < count; ++h) {
    const F* of_head = of_teams + h * stride;
    F greatest = -INFINITY, total = 0, scale[teams];
#pragma unroll
    for (int w = 0; w < teams; ++w) greatest = ::max(greatest, of_head[w * heads * stride + head_dim]);
#pragma unroll
    for (int w = 0; w < teams; ++w) {
      scale[w] = ::exp(of_head[w * heads * stride + head_dim] - greatest);
      total += scale[w] * of_head[w * heads * stride + head_dim + 1];
    }
    F* to = part_count > 1 ? &parts.sums(Index{blockIdx.z}, place, head + h, 0) : nullptr;
    for (int d = threadIdx.x; d < head_dim; d += Traits::threads) {
      F sum = 0;
#pragma unroll
      for (int w = 0; w < teams; ++w) sum += scale[w] * of_head[w * heads * stride + d];
      if (to)
        to[d] = sum;
      else
        out(t, (head + h) * head_dim + d) = A(sum / total);
    }
    if (threadIdx.x != 0) continue;
    if (to) {
      to[head_dim] = greatest;
      to[head_dim + 1] = total;
    } else {
      lse(t, head + h) = greatest + ::log(total);
    }
  }
  if (part_count == 1) return;

  // The parts are visible to all before their arrival is; who arrives last finds all of them.
  __threadfence();
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0)
    is_last = atomicAdd(parts.arrived + place * gridDim.y + blockIdx.y, 1u) == static_cast<unsigned>(part_count - 1);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  F *weights = of_teams, *totals = of_teams + Traits::most_parts;
  const Index part_stride = parts.sums.stride[0];
  for (int h = 0; h < count; ++h) {
    const F* from = &parts.sums(0, place, head + h, 0);
    if (threadIdx.x < part_count) {
      weights[threadIdx.x] = __ldcg(from + threadIdx.x * part_stride + head_dim);
      totals[threadIdx.x] = __ldcg(from + threadIdx.x * part_stride + head_dim + 1);
    }
    __syncthreads();
    F greatest = -INFINITY;
    for (int s = 0; s < part_count; ++s) greatest = ::max(greatest, weights[s]);
    __syncthreads();
    if (threadIdx.x < part_count) weights[threadIdx.x] = ::exp(weights[threadIdx.x] - greatest);
    __syncthreads();
    F total = 0;
    for (int s = 0; s < part_count; ++s) total += weights[s] * totals[s];
    for (int d = threadIdx.x; d < head_dim; d += Traits::threads) {
      F sum = 0;
#pragma unroll 16
      for (int s = 0; s < part_count; ++s) sum += weights[s] * __ldcg(from + s * part_stride + d);
      out(t, (head + h) * head_dim + d) = A(sum / total);
    }
    if (threadIdx.x == 0) lse(t, head + h) = greatest + ::log(total);
    __syncthreads();
  }
}

/// Puts Width keys, then values, of a token at its position of the caches, and zeros where the parts' arrival counts.
template <class A_, class S_, int Width_>
struct AppendPieces {
  using A = A_;
  using S = S_;
  static constexpr int width = Width_;
  Matrix<const A> k, v;
  Sequences sequences;
  Tensor<S, 3> cache_k, cache_v;
  unsigned* arrived;
  Index count;  // of arrived

  __device__ void operator()(Index t, Index piece) const {
    const Index pieces = k.cols() / width;
    const Index row = row_of(sequences, t), position = sequences.start(row) + t - sequences.begin(row);
    const bool is_key = piece < pieces;
    const Index c = (is_key ? piece : piece - pieces) * width;
    const A* from = is_key ? &k(t, c) : &v(t, c);
    S* to = is_key ? &cache_k(row, position, c) : &cache_v(row, position, c);
    if constexpr (width == 1)
      *to = S(compute_t<A>(*from));
    else
      store_piece(to, piece_at<width>(from));
    for (Index i = t * 2 * pieces + piece; i < count; i += sequences.tokens * 2 * pieces) arrived[i] = 0;
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
    require(shape.heads % shape.kv_heads == 0, "attention: heads must be a multiple of kv_heads, got ", shape.heads,
            " and ", shape.kv_heads);
    ArenaScope scope(ctx.arena());
    if (!cache_k) {
      const detail::AttentionKeys<A> keys{of_all(k), of_all(v), false};
      return attend(ctx, shape, q, keys, sequences, Arrivals{}, out, lse);
    }
    Arrivals arrivals;
    if (sequences.rows * sequences.longest != sequences.tokens || sequences.longest <= few_tokens)
      arrivals.count = places_of_few(sequences) * shape.heads;
    if (arrivals.count > 0) arrivals.at = ctx.arena().template tensor<unsigned>(arrivals.count).data;
    append(ctx, k, v, sequences, cache_k, cache_v, arrivals);
    attend(ctx, shape, q, detail::AttentionKeys<S>{cache_k, cache_v, true}, sequences, arrivals, out, lse);
  }

 private:
  /// Rows of at most so many tokens split their keys.
  static constexpr Index few_tokens = 4;
  static constexpr Index most_dimensions = 512;

  /// Counts of blocks, zeros at first.
  struct Arrivals {
    unsigned* at = nullptr;
    Index count = 0;
  };

  template <class A>
  static Tensor<const A, 3> of_all(Matrix<const A> m) {
    Tensor<const A, 3> all(m.data, 1, m.rows(), m.cols());
    all.stride[1] = m.stride[0];
    return all;
  }

  static Index places_of_few(const Sequences& sequences) {
    return sequences.rows * std::min(sequences.longest, few_tokens);
  }

  template <class A, class S>
  static void append(Context<cuda>& ctx, Matrix<const A> k, Matrix<const A> v, const Sequences& sequences,
                     Tensor<S, 3> cache_k, Tensor<S, 3> cache_v, const Arrivals& arrivals) {
    const auto with = [&]<int Width>(std::integral_constant<int, Width>) {
      detail::for_elements(
          ctx, k.rows(), 2 * k.cols() / Width,
          detail::AppendPieces<A, S, Width>{k, v, sequences, cache_k, cache_v, arrivals.at, arrivals.count},
          "attention: append");
    };
    if constexpr (std::is_same_v<A, S>)
      if (detail::in_pieces(k) && detail::in_pieces(v) && detail::in_pieces(cache_k) && detail::in_pieces(cache_v))
        return with(std::integral_constant<int, detail::wide<A>>{});
    with(std::integral_constant<int, 1>{});
  }

  template <class A, class S, class F>
  static void attend(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const detail::AttentionKeys<S>& keys, const Sequences& sequences, const Arrivals& arrivals,
                     Matrix<A> out, Matrix<F> lse) {
    const bool equal = sequences.rows * sequences.longest == sequences.tokens;
    if (!equal || sequences.longest <= few_tokens) {
      const Index per_row = std::min(sequences.longest, few_tokens);
      choose(ctx, shape, q, keys, sequences, {per_row, {1, few_tokens}}, arrivals.at, out, lse);
    }
    if (sequences.longest <= few_tokens) return;
    const detail::AttentionRows longer{few_tokens + 1, sequences.longest};
    if constexpr (std::is_same_v<A, bf16> && std::is_same_v<S, bf16>)
      if (detail::AttentionTiles::fit(ctx, shape, q, keys, out)) {
        if (detail::AttentionWarpgroups::fit(ctx, shape, keys))
          return detail::AttentionWarpgroups::launch(ctx, shape, q, keys, sequences, longer, out, lse);
        return detail::AttentionTiles::launch(ctx, shape, q, keys, sequences, longer, out, lse);
      }
    choose(ctx, shape, q, keys, sequences, {0, longer}, nullptr, out, lse);
  }

  template <class A, class S, class F>
  static void choose(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const detail::AttentionKeys<S>& keys, const Sequences& sequences,
                     const detail::AttentionPlaces& places, unsigned* arrived, Matrix<A> out, Matrix<F> lse) {
    constexpr int wide = detail::wide<S>;
    const bool in_pieces = shape.head_dim % wide == 0 && detail::aligned(keys.k, wide) && detail::aligned(keys.v, wide);
    const Index group = shape.heads / shape.kv_heads;
    const auto with =
        [&]<int Heads, int Lanes, int Width, int Pieces>(detail::AttentionTraits<A, S, Heads, Lanes, Width, Pieces>) {
          launch_pieces<Heads, Lanes, Width, Pieces>(ctx, shape, q, keys, sequences, places, arrived, out, lse);
        };
    if (!in_pieces) return with(detail::AttentionTraits<A, S, 1, 32, 1, 2>{});
    if constexpr (std::is_same_v<S, bf16>) {
      if (group > 2) return with(detail::AttentionTraits<A, S, 4, 8, wide, 1>{});
      if (group == 2) return with(detail::AttentionTraits<A, S, 2, 8, wide, 1>{});
      return with(detail::AttentionTraits<A, S, 1, 8, wide, 1>{});
    }
    with(detail::AttentionTraits<A, S, 1, 32, wide, 1>{});
  }

  /// With as many lanes, then pieces a lane, as a head needs.
  template <int Heads, int Lanes, int Width, int Pieces, class A, class S, class F>
  static void launch_pieces(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                            const detail::AttentionKeys<S>& keys, const Sequences& sequences,
                            const detail::AttentionPlaces& places, unsigned* arrived, Matrix<A> out, Matrix<F> lse) {
    if constexpr (Lanes * Width * Pieces < most_dimensions) {
      constexpr int lanes = std::min(2 * Lanes, 32), pieces = Lanes < 32 ? Pieces : 2 * Pieces;
      if (shape.head_dim > Lanes * Width * Pieces)
        return launch_pieces<Heads, lanes, Width, pieces>(ctx, shape, q, keys, sequences, places, arrived, out, lse);
    }
    launch<detail::AttentionTraits<A, S, Heads, Lanes, Width, Pieces>>(ctx, shape, q, keys, sequences, places, arrived,
                                                                       out, lse);
  }

  template <class Traits, class A, class S, class F>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                     const detail::AttentionKeys<S>& keys, const Sequences& sequences,
                     const detail::AttentionPlaces& places, unsigned* arrived, Matrix<A> out, Matrix<F> lse) {
    const Index group = shape.heads / shape.kv_heads;
    const Index across = shape.kv_heads * ((group + Traits::heads - 1) / Traits::heads);
    const Index down = places.per_row ? sequences.rows * places.per_row : sequences.tokens;
    const Index keys_at_most = keys.k.shape[1];
    const Index most_parts =
        arrived ? std::min<Index>((keys_at_most + Traits::least_keys - 1) / Traits::least_keys, Traits::most_parts) : 1;
    const Index of_teams = Traits::teams * Traits::heads * (shape.head_dim + 2);
    const auto shared = static_cast<std::size_t>(std::max<Index>(of_teams, 2 * Traits::most_parts)) * sizeof(F);
    ArenaScope scope(ctx.arena());
    detail::AttentionParts<F> parts{{}, arrived};
    if (most_parts > 1) parts.sums = ctx.arena().template tensor<F>(most_parts, down, shape.heads, shape.head_dim + 2);
    const dim3 grid(static_cast<unsigned>(down), static_cast<unsigned>(across), static_cast<unsigned>(most_parts));
    detail::attention_kernel<Traits>
        <<<grid, Traits::threads, shared, ctx.stream()>>>(shape, q, keys, sequences, places, parts, out, lse);
    detail::check_launch("attention");
  }
};

}  // namespace zamba
