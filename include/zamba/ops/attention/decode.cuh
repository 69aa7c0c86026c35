// SPDX-License-Identifier: MIT
// Split-KV decode, as FlashDecoding: attention of rows of few tokens, at the pace of memory; equations and shapes in
// ops/attention.hpp.
//
// A block takes one token, up to four heads that share keys, and one split of the keys after another. Teams of lanes
// take turns at the keys, each with an online softmax of its own; the lanes of a team share the head's dimensions. What
// a lane needs of the next keys and values is on its way into shared memory while it computes: it reads no other lane's
// vectors, so nothing is waited for but its own copies. Where there are several splits, a second kernel combines them.
//
// The number of splits is bounded, so the grid does not depend on how long a cache may become. Neighbouring blocks are
// those of one token's heads, whose keys are neighbours in memory.
//
// Numeric contract: scores, softmax and sums in compute_t; the splits of a token and the order of its keys follow from
// its position alone, however many blocks share the splits. Rounded once when written.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/kernel/async_copy.cuh>
#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/append.cuh>
#include <zamba/ops/attention/splits.cuh>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Activations of A_, keys of S_, Heads_ of a token together. Teams of Lanes_ lanes: lane l holds vectors l, l +
/// Lanes_,
/// ... of a head, Vectors_ of them, of Width_ dimensions.
template <class A_, class S_, int Heads_, int Lanes_, int Width_, int Vectors_>
struct AttentionDecodeTraits {
  using A = A_;
  using S = S_;
  using F = compute_t<A>;
  using Stored = AlignedVector<S, Width_>;
  using Append = AppendToCache<A, S, std::is_same_v<A, S> ? Width_ : 1>;
  static constexpr int heads = Heads_, lanes = Lanes_, width = Width_, vectors = Vectors_;
  static constexpr int query_width = std::min(width, vector_width<A>);  // of a vector of the query
  static constexpr int threads = 128, teams = threads / lanes;
  // A stage is the keys that all teams take at once, and their values.
  static constexpr int at_once = std::max(4 / vectors, 1);  // keys of a team
  static constexpr int turn = teams * at_once;
  static constexpr int stage_vectors = 2 * at_once * vectors * threads;
  static constexpr int stage_bytes = stage_vectors * static_cast<int>(sizeof(Stored));
  static constexpr int stages = std::max((32 << 10) / stage_bytes, 2);
  static constexpr int blocks = heads == 1 && vectors <= 2 ? 4 : 1;  // of a multiprocessor, at least
  static_assert(32 % lanes == 0);

  using Query = F[heads][vectors][width];  // this lane's
  using Scores = F[heads][at_once];        // S or P of a team's keys, in all its lanes
};

/// The place and the heads of a block, which share keys.
template <class Traits>
struct DecodeHeads {
  int place, kv_head, head, count;  // head: the first of `count`

  __device__ explicit DecodeHeads(const AttentionShape& shape) {
    const int kv_heads = static_cast<int>(shape.kv_heads), group = static_cast<int>(shape.heads) / kv_heads;
    const int of_group = ceil_div(group, Traits::heads), across = kv_heads * of_group;
    const int in_group = blockIdx.x % of_group * Traits::heads;
    place = static_cast<int>(blockIdx.x) / across;
    kv_head = static_cast<int>(blockIdx.x) % across / of_group;
    head = kv_head * group + in_group;
    count = ::min(Traits::heads, group - in_group);
  }
};

/// The online softmax of one head in a team, and the sum of exp(score - max) times values in its lanes.
template <class Traits>
struct DecodeSoftmax {
  using F = typename Traits::F;
  SoftmaxRow<F> row;
  F o[Traits::vectors][Traits::width] = {};

  /// S of keys becomes P; scores of -infinity are of no key. Most often no score is greater than those before.
  __device__ __forceinline__ void update(F (&scores)[Traits::at_once]) {
    F next = row.max;
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) next = ::max(next, scores[b]);
    if (next > row.max) {
      const F rescale = row.raise(next, [](F x) { return ::exp(x); });
#pragma unroll
      for (int p = 0; p < Traits::vectors; ++p)
#pragma unroll
        for (int i = 0; i < Traits::width; ++i) o[p][i] *= rescale;
    }
#pragma unroll
    for (int b = 0; b < Traits::at_once; ++b) {
      scores[b] = scores[b] == -INFINITY ? F(0) : ::exp(scores[b] - next);
      row.sum += scores[b];
    }
  }
};

/// A lane's share of keys and values: its vectors of those that its team takes.
template <class Traits>
struct DecodeLane {
  using A = typename Traits::A;
  using S = typename Traits::S;
  using F = typename Traits::F;
  using Stored = typename Traits::Stored;
  static constexpr int heads = Traits::heads, lanes = Traits::lanes, at_once = Traits::at_once;
  static constexpr int vectors = Traits::vectors, width = Traits::width;

  int lane, team, head_dim;
  Stored* stored;            // its place in stage 0: (stages, 2, at_once, vectors) of every thread, keys and values
  const S *k, *v;            // its vector 0 of the team's first key and value where those of the row begin
  Index k_stride, v_stride;  // from one position to the next

  __device__ __forceinline__ DecodeLane(void* stages, int head_dim, const AttentionKeys<S>& keys,
                                        const SplitToken& token, int kv_head)
      : lane(static_cast<int>(threadIdx.x) % lanes),
        team(static_cast<int>(threadIdx.x) / lanes),
        head_dim(head_dim),
        stored(static_cast<Stored*>(stages) + threadIdx.x),
        k_stride(keys.k.stride[1]),
        v_stride(keys.v.stride[1]) {
    const Index column = Index{kv_head} * head_dim + lane * width;
    k = keys.key(token.row, token.begin) + column + team * at_once * k_stride;
    v = keys.value(token.row, token.begin) + column + team * at_once * v_stride;
  }

  /// Whether the head has vector p of the lane.
  __device__ __forceinline__ bool holds(int p) const { return (lanes * p + lane) * width < head_dim; }

  /// Begins to copy what it needs of the turn of keys from position `at` on; a group of copies, empty from `end` on.
  __device__ __forceinline__ void fetch(int at, int end, int stage) const {
    if (at < end) {
      Stored* const to = stored + stage * Traits::stage_vectors;
      const S* const from[] = {k + at * k_stride, v + at * v_stride};
      const Index stride[] = {k_stride, v_stride};
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int b = 0; b < at_once; ++b)
#pragma unroll
          for (int p = 0; p < vectors; ++p) {
            const S* const vector = from[i] + b * stride[i] + lanes * p * width;
            const bool valid = at + team * at_once + b < end;
            Stored* const there = to + ((i * at_once + b) * vectors + p) * Traits::threads;
            if (!holds(p)) continue;
            if constexpr (width == 1)
              there->words[0] = valid ? *vector : S(0);
            else
              copy_async_prefetch(there, vector, valid);
          }
    }
    copy_async_commit();
  }

  /// The queries of a token's heads, times scale.
  __device__ __forceinline__ void load_query(const Matrix<const A>& q, Index token, const DecodeHeads<Traits>& of,
                                             F scale, typename Traits::Query& query) const {
#pragma unroll
    for (int h = 0; h < heads; ++h)
#pragma unroll
      for (int p = 0; p < vectors; ++p) {
        const int head = of.head + ::min(h, of.count - 1);
        const A* const vector = &q(token, head * head_dim + (lanes * p + lane) * width);
#pragma unroll
        for (int i = 0; i < width; ++i) query[h][p][i] = 0;
        if (!holds(p)) continue;
        constexpr int each = Traits::query_width;
#pragma unroll
        for (int j = 0; j < width / each; ++j) {
          F values[each];
          load_vector<each>(vector + j * each).unpack(values);
#pragma unroll
          for (int i = 0; i < each; ++i) query[h][p][j * each + i] = values[i] * scale;
        }
      }
  }

  /// S = q . k of the team's keys in a stage, this lane's share.
  __device__ __forceinline__ void multiply_keys(const typename Traits::Query& query, int stage,
                                                typename Traits::Scores& scores) const {
    const Stored* const key = stored + stage * Traits::stage_vectors;
#pragma unroll
    for (int b = 0; b < at_once; ++b)
#pragma unroll
      for (int p = 0; p < vectors; ++p) {
        if (!holds(p)) continue;
        F values[width];
        key[(b * vectors + p) * Traits::threads].unpack(values);
#pragma unroll
        for (int h = 0; h < heads; ++h)
#pragma unroll
          for (int i = 0; i < width; ++i) scores[h][b] += query[h][p][i] * values[i];
      }
  }

  /// S of a head, summed over the team; -infinity for keys from `end` on, the turn's first being `at`.
  __device__ __forceinline__ void sum_over_team(F (&scores)[at_once], int at, int end) const {
#pragma unroll
    for (int b = 0; b < at_once; ++b) {
#pragma unroll
      for (int distance = lanes / 2; distance > 0; distance /= 2)
        scores[b] += __shfl_xor_sync(0xffffffffu, scores[b], distance);
      if (at + team * at_once + b >= end) scores[b] = -INFINITY;
    }
  }

  /// O += P V over the team's keys in a stage.
  __device__ __forceinline__ void add_values(const typename Traits::Scores& p_of, int stage,
                                             DecodeSoftmax<Traits> (&softmax)[heads]) const {
    const Stored* const value = stored + stage * Traits::stage_vectors + at_once * vectors * Traits::threads;
#pragma unroll
    for (int b = 0; b < at_once; ++b)
#pragma unroll
      for (int p = 0; p < vectors; ++p) {
        if (!holds(p)) continue;
        F values[width];
        value[(b * vectors + p) * Traits::threads].unpack(values);
#pragma unroll
        for (int h = 0; h < heads; ++h)
#pragma unroll
          for (int i = 0; i < width; ++i) softmax[h].o[p][i] += p_of[h][b] * values[i];
      }
  }

  /// Writes what the team found: (teams, heads, head_dim + 2) of o, max and sum.
  __device__ __forceinline__ void store(const DecodeSoftmax<Traits> (&softmax)[heads], F* of_teams) const {
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      F* const to = of_teams + (team * heads + h) * (head_dim + 2);
#pragma unroll
      for (int p = 0; p < vectors; ++p)
#pragma unroll
        for (int i = 0; i < width; ++i)
          if (holds(p)) to[(lanes * p + lane) * width + i] = softmax[h].o[p][i];
      if (lane == 0) {
        to[head_dim] = softmax[h].row.max;
        to[head_dim + 1] = softmax[h].row.sum;
      }
    }
  }
};

/// Puts the token's new keys and values of one head, from position `first` to `end`, into the cache.
template <class Traits>
__device__ __forceinline__ void append_split(const typename Traits::Append& append, const SplitToken& token, int first,
                                             int end, int head_dim, int kv_head) {
  const int from = ::max(first, token.start), columns = head_dim / Traits::Append::width;
  for (int i = threadIdx.x; i < (end - from) * 2 * columns; i += Traits::threads) {
    const int position = from + i / (2 * columns);
    append.head(i % (2 * columns), head_dim, kv_head, token.begin + position - token.start, token.row, position);
  }
  __syncthreads();
}

/// The teams' results for a head, combined in order: the weight of each, exp(its max - max), and the whole sum.
template <class Traits>
struct CombinedTeams {
  using A = typename Traits::A;
  using F = typename Traits::F;
  static constexpr int teams = Traits::teams;
  const F* from;  // the head's o, max and sum of the first team
  int head_dim, stride;
  F max = -INFINITY, sum = 0, weight[teams];

  __device__ __forceinline__ CombinedTeams(const F* from, int head_dim)
      : from(from), head_dim(head_dim), stride(Traits::heads * (head_dim + 2)) {
#pragma unroll
    for (int w = 0; w < teams; ++w) max = ::max(max, from[w * stride + head_dim]);
#pragma unroll
    for (int w = 0; w < teams; ++w) {
      weight[w] = ::exp(from[w * stride + head_dim] - max);
      sum += weight[w] * from[w * stride + head_dim + 1];
    }
  }
  __device__ __forceinline__ F o(int d) const {
    F total = 0;
#pragma unroll
    for (int w = 0; w < teams; ++w) total += weight[w] * from[w * stride + d];
    return total;
  }

  /// partial (head_dim + 2): o, max and sum of one split of several; null for the only one: out (head_dim) and lse.
  __device__ __forceinline__ void store(F* partial, A* out, F* lse) const {
    for (int d = threadIdx.x; d < head_dim; d += Traits::threads) {
      const F x = o(d);
      if (partial)
        partial[d] = x;
      else
        out[d] = A(x / sum);
    }
    if (threadIdx.x != 0) return;
    if (partial) {
      partial[head_dim] = max;
      partial[head_dim + 1] = sum;
    } else {
      *lse = max + ::log(sum);
    }
  }
};

/// The keys of a split, positions `first` to `end`, turn by turn: what the team found.
template <class Traits>
__device__ __forceinline__ void attend_split(const DecodeLane<Traits>& lane, const typename Traits::Query& query,
                                             int first, int end, DecodeSoftmax<Traits> (&softmax)[Traits::heads]) {
  int stage = 0;
  for (int at = first; at < end; at += Traits::turn) {
    copy_async_wait<Traits::stages - 1>();
    typename Traits::Scores scores = {};
    lane.multiply_keys(query, stage, scores);
#pragma unroll
    for (int h = 0; h < Traits::heads; ++h) {
      lane.sum_over_team(scores[h], at, end);
      softmax[h].update(scores[h]);
    }
    lane.add_values(scores, stage, softmax);
    lane.fetch(at + Traits::stages * Traits::turn, end, stage);
    stage = stage + 1 < Traits::stages ? stage + 1 : 0;
  }
}

/// Blocks across: places, and in them the heads; down: they share the splits. partial (splits, places, heads,
/// head_dim + 2): for each split of several its o, max and sum; without it there is one split. Where `append` has keys,
/// a block puts those of its split into the cache before it reads them.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    attention_decode_kernel(AttentionShape shape, Matrix<const typename Traits::A> q,
                            AttentionKeys<typename Traits::S> keys, typename Traits::Append append, Sequences sequences,
                            AttentionPlaces places, Tensor<typename Traits::F, 4> partial,
                            Matrix<typename Traits::A> out, Matrix<typename Traits::F> lse) {
  using F = typename Traits::F;
  extern __shared__ uint4 attention_stages[];
  launch_dependents();
  const int head_dim = static_cast<int>(shape.head_dim);
  const DecodeHeads<Traits> heads(shape);
  grid_dependency_wait();
  const SplitToken token(sequences, places, heads.place, keys.cached, static_cast<bool>(partial));
  const DecodeLane<Traits> lane(attention_stages, head_dim, keys, token, heads.kv_head);

  for (int split = blockIdx.y; split < token.splits; split += gridDim.y) {
    const int first = split * token.keys, end = ::min(first + token.keys, token.visible);
    if (append.k && end > token.start) append_split<Traits>(append, token, first, end, head_dim, heads.kv_head);
#pragma unroll
    for (int s = 0; s < Traits::stages; ++s) lane.fetch(first + s * Traits::turn, end, s);
    typename Traits::Query query;
    lane.load_query(q, token.token, heads, F(shape.scale), query);
    DecodeSoftmax<Traits> softmax[Traits::heads];
    attend_split(lane, query, first, end, softmax);

    F* const of_teams = reinterpret_cast<F*>(attention_stages);  // in place of the stages
    __syncthreads();
    lane.store(softmax, of_teams);
    __syncthreads();
    for (int h = 0; h < heads.count; ++h) {
      const CombinedTeams<Traits> all(of_teams + h * (head_dim + 2), head_dim);
      const int head = heads.head + h;
      all.store(token.splits > 1 ? &partial(split, heads.place, head, 0) : nullptr, &out(token.token, head * head_dim),
                &lse(token.token, head));
    }
    __syncthreads();
  }
}

}  // namespace zamba::kernel
