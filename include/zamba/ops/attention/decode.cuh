// SPDX-License-Identifier: MIT
// attention of rows of few tokens, at the pace of memory; equations and shapes in ops/attention.hpp.
//
// A block takes one token, up to four heads that share keys, and one part of the keys after another. Teams of lanes
// take turns at the keys, each with a running softmax of its own; the lanes of a team share the head's dimensions. What
// a lane needs of the next keys and values is on its way into shared memory while it computes: it reads no other lane's
// pieces, so nothing is waited for but its own copies. Where there are several parts, a second kernel joins them.
//
// The number of parts is bounded, so the grid does not depend on how long a cache may become. Neighbouring blocks are
// those of one token's heads, whose keys are neighbours in memory.
//
// Numeric contract: scores, softmax and sums in compute_t; the parts of a token and the order of its keys follow from
// its position alone, however many blocks share the parts. Rounded once when written.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Puts Width keys or values of a token at its position of the caches.
template <class A_, class S_, int Width_>
struct AppendPieces {
  using A = A_;
  using S = S_;
  static constexpr int width = Width_;
  Matrix<const A> k, v;
  Sequences sequences;
  Tensor<S, 3> cache_k, cache_v;

  /// Pieces of keys, then of values.
  __device__ void operator()(Index t, Index piece) const {
    if (t >= sequences.begin(sequences.rows)) return;
    const Index row = row_of(sequences, t), position = sequences.start(row) + t - sequences.begin(row);
    const Index c = piece * width;
    if (c < k.cols())
      put(k, cache_k, t, row, position, c);
    else
      put(v, cache_v, t, row, position, c - k.cols());
  }

  /// Piece i of the keys, then of the values, of one head.
  __device__ void head(int i, int head_dim, int kv_head, Index t, Index row, Index position) const {
    const int c = i * width;
    if (c < head_dim)
      put(k, cache_k, t, row, position, Index{kv_head} * head_dim + c);
    else
      put(v, cache_v, t, row, position, Index{kv_head} * head_dim + c - head_dim);
  }

  static __device__ void put(const Matrix<const A>& from, const Tensor<S, 3>& to, Index t, Index row, Index position,
                             Index c) {
    if constexpr (width == 1)
      to(row, position, c) = S(compute_t<A>(from(t, c)));
    else
      store_vector(&to(row, position, c), load_vector<width>(&from(t, c)));
  }
};

/// Activations of A_, keys of S_, Heads_ of a token together. Teams of Lanes_ lanes: lane l holds pieces l, l + Lanes_,
/// ... of a head, Pieces_ of them, of Width_ dimensions.
template <class A_, class S_, int Heads_, int Lanes_, int Width_, int Pieces_>
struct AttentionTraits {
  using A = A_;
  using S = S_;
  using F = compute_t<A>;
  using Stored = AlignedVector<S, Width_>;
  using Append = AppendPieces<A, S, std::is_same_v<A, S> ? Width_ : 1>;
  static constexpr int heads = Heads_, lanes = Lanes_, width = Width_, pieces = Pieces_;
  static constexpr int query_width = std::min(width, vector_width<A>);  // of a piece of the query
  static constexpr int threads = 128, teams = threads / lanes;
  // A stage is the keys that all teams take at once, and their values.
  static constexpr int at_once = std::max(4 / pieces, 1);  // keys of a team
  static constexpr int turn = teams * at_once;
  static constexpr int stage_pieces = 2 * at_once * pieces * threads;
  static constexpr int stage_bytes = stage_pieces * static_cast<int>(sizeof(Stored));
  static constexpr int stages = std::max((32 << 10) / stage_bytes, 2);
  static constexpr int blocks = heads == 1 && pieces <= 2 ? 4 : 1;  // of a multiprocessor, at least
  static_assert(32 % lanes == 0);
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
    if (next > greatest) {
      const F shrink = ::exp(greatest - next);  // 0 where there was no key yet
      greatest = next;
      total *= shrink;
#pragma unroll
      for (int p = 0; p < Traits::pieces; ++p)
#pragma unroll
        for (int i = 0; i < Traits::width; ++i) sum[p][i] *= shrink;
    }
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
  int per_row;
  AttentionRows rows;
};

/// The token of a place, and the parts of its keys.
struct AttentionToken {
  static constexpr int least_keys = 64;  // of a part, where there are several; their sizes are multiples of it
  static constexpr int most_parts = 32;

  Index row, begin, token;
  int start, visible;  // positions of the row before the batch; keys that the token sees
  int part, parts;     // keys of a part, but for the last; parts: 0 where the place has no token

  __device__ AttentionToken(const Sequences& sequences, const AttentionPlaces& places, int place, bool cached,
                            bool split) {
    row = places.per_row ? place / places.per_row : row_of(sequences, place);
    begin = sequences.begin(row);
    token = places.per_row ? begin + place % places.per_row : place;
    start = cached ? static_cast<int>(sequences.start(row)) : 0;
    const Index length = sequences.length(row);
    visible = start + static_cast<int>(token - begin) + 1;
    part = split ? part_of(visible) : visible;
    parts = token - begin < length && places.rows.have(length) ? ceil_div(visible, part) : 0;
  }

  static __device__ int part_of(int visible) {
    constexpr int most = least_keys * most_parts;
    return ceil_div(visible, most) * least_keys;
  }
};

/// Blocks across: places, and in them the heads; down: they share the parts. sums (parts, places, heads, head_dim + 2):
/// for each part of several its sum, greatest and total; without sums there is one part. Where `append` has keys, a
/// block puts those of its part into the cache before it reads them.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    attention_tokens_kernel(AttentionShape shape, Matrix<const typename Traits::A> q,
                            AttentionKeys<typename Traits::S> keys, typename Traits::Append append, Sequences sequences,
                            AttentionPlaces places, Tensor<typename Traits::F, 4> sums, Matrix<typename Traits::A> out,
                            Matrix<typename Traits::F> lse) {
  using A = typename Traits::A;
  using S = typename Traits::S;
  using F = typename Traits::F;
  using Stored = typename Traits::Stored;
  constexpr int heads = Traits::heads, lanes = Traits::lanes, teams = Traits::teams, at_once = Traits::at_once;
  constexpr int pieces = Traits::pieces, width = Traits::width, threads = Traits::threads, stages = Traits::stages;
  extern __shared__ uint4 attention_stages[];
  launch_dependents();
  const int thread = threadIdx.x, lane = thread % lanes, team = thread / lanes;
  const int head_dim = static_cast<int>(shape.head_dim), kv_heads = static_cast<int>(shape.kv_heads);
  const int group = static_cast<int>(shape.heads) / kv_heads, of_group = ceil_div(group, heads);
  const int across = kv_heads * of_group, place = static_cast<int>(blockIdx.x) / across;
  const int kv_head = static_cast<int>(blockIdx.x) % across / of_group, in_group = blockIdx.x % of_group * heads;
  const int head = kv_head * group + in_group, count = ::min(heads, group - in_group);
  grid_dependency_wait();
  const AttentionToken token(sequences, places, place, keys.cached, static_cast<bool>(sums));
  Stored* const stored = reinterpret_cast<Stored*>(attention_stages) + thread;
  const auto held = [&](int p) { return (lanes * p + lane) * width < head_dim; };
  const Index column = Index{kv_head} * head_dim + lane * width;
  const S* const k = keys.key(token.row, token.begin) + column + team * at_once * keys.k.stride[1];
  const S* const v = keys.value(token.row, token.begin) + column + team * at_once * keys.v.stride[1];

  for (int part = blockIdx.y; part < token.parts; part += gridDim.y) {
    const int first = part * token.part, end = ::min(first + token.part, token.visible);
    if (append.k && end > token.start) {
      const int from = ::max(first, token.start), columns = head_dim / Traits::Append::width;
      for (int i = thread; i < (end - from) * 2 * columns; i += threads) {
        const int position = from + i / (2 * columns);
        append.head(i % (2 * columns), head_dim, kv_head, token.begin + position - token.start, token.row, position);
      }
      __syncthreads();
    }

    const auto fetch = [&](int at, int stage) {
      if (at < end) {
        Stored* const to = stored + stage * Traits::stage_pieces;
        const S* const from[] = {k + at * keys.k.stride[1], v + at * keys.v.stride[1]};
        const Index stride[] = {keys.k.stride[1], keys.v.stride[1]};
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int b = 0; b < at_once; ++b)
#pragma unroll
            for (int p = 0; p < pieces; ++p) {
              const S* const piece = from[i] + b * stride[i] + lanes * p * width;
              const bool valid = at + team * at_once + b < end;
              Stored* const there = to + ((i * at_once + b) * pieces + p) * threads;
              if (!held(p)) continue;
              if constexpr (width == 1)
                there->words[0] = valid ? *piece : S(0);
              else
                copy_async_prefetch(there, piece, valid);
            }
      }
      copy_async_commit();
    };
#pragma unroll
    for (int s = 0; s < stages; ++s) fetch(first + s * Traits::turn, s);

    F query[heads][pieces][width];
#pragma unroll
    for (int h = 0; h < heads; ++h)
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        const A* const from = &q(token.token, (head + ::min(h, count - 1)) * head_dim + (lanes * p + lane) * width);
#pragma unroll
        for (int i = 0; i < width; ++i) query[h][p][i] = 0;
        if (!held(p)) continue;
        constexpr int each = Traits::query_width;
#pragma unroll
        for (int j = 0; j < width / each; ++j) {
          F values[each];
          load_vector<each>(from + j * each).unpack(values);
#pragma unroll
          for (int i = 0; i < each; ++i) query[h][p][j * each + i] = values[i] * F(shape.scale);
        }
      }

    Softmax<Traits> softmax[heads];
    int stage = 0;
    for (int at = first; at < end; at += Traits::turn) {
      copy_async_wait<stages - 1>();
      const Stored* const key = stored + stage * Traits::stage_pieces;
      const Stored* const value = key + at_once * pieces * threads;
      F scores[heads][at_once] = {};
#pragma unroll
      for (int b = 0; b < at_once; ++b)
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
          if (!held(p)) continue;
          F values[width];
          key[(b * pieces + p) * threads].unpack(values);
#pragma unroll
          for (int h = 0; h < heads; ++h)
#pragma unroll
            for (int i = 0; i < width; ++i) scores[h][b] += query[h][p][i] * values[i];
        }
      F weights[heads][at_once];
#pragma unroll
      for (int h = 0; h < heads; ++h) {
#pragma unroll
        for (int b = 0; b < at_once; ++b) {
#pragma unroll
          for (int distance = lanes / 2; distance > 0; distance /= 2)
            scores[h][b] += __shfl_xor_sync(0xffffffffu, scores[h][b], distance);
          if (at + team * at_once + b >= end) scores[h][b] = -INFINITY;
        }
        softmax[h].add(scores[h], weights[h]);
      }
#pragma unroll
      for (int b = 0; b < at_once; ++b)
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
          if (!held(p)) continue;
          F values[width];
          value[(b * pieces + p) * threads].unpack(values);
#pragma unroll
          for (int h = 0; h < heads; ++h)
#pragma unroll
            for (int i = 0; i < width; ++i) softmax[h].sum[p][i] += weights[h][b] * values[i];
        }
      fetch(at + stages * Traits::turn, stage);
      stage = stage + 1 < stages ? stage + 1 : 0;
    }

    // The teams' sums take the place of the stages: (teams, heads, head_dim + 2).
    __syncthreads();
    const int stride = head_dim + 2;
    F* const of_teams = reinterpret_cast<F*>(attention_stages);
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      F* const of_head = of_teams + (team * heads + h) * stride;
#pragma unroll
      for (int p = 0; p < pieces; ++p)
#pragma unroll
        for (int i = 0; i < width; ++i)
          if (held(p)) of_head[(lanes * p + lane) * width + i] = softmax[h].sum[p][i];
      if (lane == 0) {
        of_head[head_dim] = softmax[h].greatest;
        of_head[head_dim + 1] = softmax[h].total;
      }
    }
    __syncthreads();
    for (int h = 0; h < count; ++h) {
      const F* const of_head = of_teams + h * stride;
      F greatest = -INFINITY, total = 0, scale[teams];
#pragma unroll
      for (int w = 0; w < teams; ++w) greatest = ::max(greatest, of_head[w * heads * stride + head_dim]);
#pragma unroll
      for (int w = 0; w < teams; ++w) {
        scale[w] = ::exp(of_head[w * heads * stride + head_dim] - greatest);
        total += scale[w] * of_head[w * heads * stride + head_dim + 1];
      }
      F* const to = token.parts > 1 ? &sums(part, place, head + h, 0) : nullptr;
      for (int d = thread; d < head_dim; d += threads) {
        F sum = 0;
#pragma unroll
        for (int w = 0; w < teams; ++w) sum += scale[w] * of_head[w * heads * stride + d];
        if (to)
          to[d] = sum;
        else
          out(token.token, (head + h) * head_dim + d) = A(sum / total);
      }
      if (thread != 0) continue;
      if (to) {
        to[head_dim] = greatest;
        to[head_dim + 1] = total;
      } else {
        lse(token.token, head + h) = greatest + ::log(total);
      }
    }
    __syncthreads();
  }
}

template <class A_>
struct AttentionJoinTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 256;
};

/// Joins the parts of tokens that have several, in order. Blocks: places, and in them the heads.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_join_kernel(AttentionShape shape, Sequences sequences, AttentionPlaces places,
                          Tensor<const typename Traits::F, 4> sums, Matrix<typename Traits::A> out,
                          Matrix<typename Traits::F> lse) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int most = AttentionToken::most_parts, at_once = 16;
  static_assert(most == 32, "zamba: a lane holds the weight of a part");
  launch_dependents();
  grid_dependency_wait();
  const int heads = static_cast<int>(shape.heads), head_dim = static_cast<int>(shape.head_dim);
  const int place = static_cast<int>(blockIdx.x) / heads, head = static_cast<int>(blockIdx.x) % heads;
  const AttentionToken token(sequences, places, place, true, true);
  if (token.parts < 2) return;
  const int lane = threadIdx.x % 32;
  const F* const from = &sums(0, place, head, 0);
  const Index stride = sums.stride[0];
  const bool is_part = lane < token.parts;
  const F greatest_of_part = is_part ? from[lane * stride + head_dim] : F(-INFINITY);
  const F total_of_part = is_part ? from[lane * stride + head_dim + 1] : F(0);
  F greatest = greatest_of_part;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    greatest = ::max(greatest, __shfl_xor_sync(0xffffffffu, greatest, distance));
  const F weight = is_part ? ::exp(greatest_of_part - greatest) : F(0), weighed = weight * total_of_part;
  F total = 0;
#pragma unroll
  for (int s = 0; s < most; ++s) total += __shfl_sync(0xffffffffu, weighed, s);
  for (int first = threadIdx.x - lane; first < head_dim; first += Traits::threads) {
    const int d = ::min(first + lane, head_dim - 1);
    F sum = 0;
    for (int part = 0; part < token.parts; part += at_once) {
      F values[at_once];
#pragma unroll
      for (int s = 0; s < at_once; ++s) values[s] = part + s < token.parts ? from[(part + s) * stride + d] : F(0);
#pragma unroll
      for (int s = 0; s < at_once; ++s) sum += __shfl_sync(0xffffffffu, weight, part + s) * values[s];
    }
    if (first + lane < head_dim) out(token.token, head * head_dim + d) = A(sum / total);
  }
  if (threadIdx.x == 0) lse(token.token, head) = greatest + ::log(total);
}

}  // namespace zamba::kernel
