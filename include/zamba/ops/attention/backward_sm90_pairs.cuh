// SPDX-License-Identifier: MIT
// Gradients by two warpgroups that share the pairs of a block, by wgmma and TMA: see backward_sm90.cuh. A block owns 64
// rows X, keys or queries; tiles of columns Y pass by, in two rings.
//
//                 own keys                                own queries
//   probabilities S^T = K Q^T, P^T; d_v += P^T d_out      S = Q K^T, P                              warpgroup 0
//   scores        dP^T = V d_out^T, dS^T; d_k += dS^T Q   dP = d_out V^T, dS; d_q += dS K           warpgroup 1
//   producer      a warp loads K, Q and lse; another V, d_out and d_out . out                       warpgroup 2
//
// P passes from warpgroup 0 to 1 through shared memory, every thread's to the thread of the same place. Products of a
// tile are queued with the sums of the tile before, so that the tensor cores work while P and dS are computed.
//
// Wide heads: two blocks are a cluster, and each has half of the dimensions of the same rows: of its products, which
// are then added to those of the other one, and of its sums.
#pragma once

#include <cstdint>
#include <type_traits>

#include <zamba/ops/attention/backward_tile.cuh>
#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Q or K, and d_out or V: those that a block owns, and those that pass by.
struct AttentionBackwardMaps {
  CUtensorMap owned[2], passing[2];
};

/// What a block owns, and what passes by. Column c meets row r where c <= r + diagonal, if the rows are queries, or
/// c >= r + diagonal, if they are keys.
struct PassedRows {
  TmaCoordinates owned, passing;  // row 0; column 0 of the first head
  int rows, first_column, columns, diagonal, heads;
};

struct PassedQueries : PassedRows {
  QueryTile tile;

  template <class Traits>
  __device__ PassedQueries(Traits, const AttentionShape& shape, const AttentionBackwardTensors<bf16>& at,
                           const AttentionKeys<bf16>& source, const Sequences& sequences)
      : PassedRows{},
        tile(
            QueryTile::of_block<Traits::rows, Traits::blocks>(shape, at.q, source, sequences, {1, sequences.longest})) {
    owned = {0, tile.head, tile.token, 0};
    passing = {0, tile.head / static_cast<int>(shape.heads / shape.kv_heads), tile.first_key, tile.row};
    rows = tile.tokens;
    columns = tile.keys;
    diagonal = tile.position;
    heads = 1;
  }
};

template <int Rows>
struct PassedKeys : PassedRows {
  KeyTile<Rows> tile;

  template <class Traits>
  __device__ PassedKeys(Traits, const AttentionShape& shape, const AttentionBackwardTensors<bf16>& at,
                        const AttentionKeys<bf16>& source, const Sequences& sequences)
      : PassedRows{},
        tile(KeyTile<Rows>::template of_block<Traits::blocks>(shape, source, sequences, bool(at.d_k.cache))) {
    const int begin = static_cast<int>(tile.of.begin);
    heads = static_cast<int>(shape.heads / shape.kv_heads);
    owned = source.cached ? TmaCoordinates{0, tile.kv_head, tile.first, static_cast<int>(tile.of.row)}
                          : TmaCoordinates{0, tile.kv_head, tile.first + begin, 0};
    passing = {0, tile.kv_head * heads, begin, 0};
    rows = tile.keys;
    first_column = tile.first_query();
    columns = tile.of.tokens;
    diagonal = tile.first - tile.of.past;
  }
};

/// Heads of at most Dims_ dimensions times Blocks_, tiles of Columns_; stages of Q or K, and of d_out or V. Those of Q
/// or K are read for the scores, and again for the sums, much later: two stages of them would keep warpgroups waiting.
template <bool OwnsQueries_, int Dims_, int Columns_, int FirstStages_, int SecondStages_, int Blocks_ = 1>
struct AttentionPairTraits {
  static constexpr bool owns_queries = OwnsQueries_;
  static constexpr int dims = Dims_, columns = Columns_, rows = 64, blocks = Blocks_;
  template <int I>
  static constexpr int stages = I == 0 ? FirstStages_ : SecondStages_;
  static constexpr int all_stages = FirstStages_ + SecondStages_;
  static constexpr int threads = 3 * warpgroup_threads;
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int owned_atom = rows * atom_row_bytes, owned_bytes = atoms * owned_atom;
  static constexpr int passing_atom = columns * atom_row_bytes, stage_bytes = atoms * passing_atom;
  static constexpr int pair_vectors = columns / 16 * warpgroup_threads, pair_stages = 2;    // of P, in bf16
  static constexpr int partial_vectors = blocks > 1 ? columns / 8 * warpgroup_threads : 0;  // of S, in float
  static constexpr int partial_bytes = partial_vectors * static_cast<int>(sizeof(float4));
  static constexpr std::size_t shared_bytes = atom_alignment + 2 * owned_bytes + all_stages * stage_bytes +
                                              pair_stages * pair_vectors * sizeof(uint4) + 2 * partial_bytes;
  static constexpr int consumer_registers = 232, producer_registers = 40;  // together those of the launch, 3 x 168

  using Tile = std::conditional_t<owns_queries, PassedQueries, PassedKeys<rows>>;
};

template <class Traits>
struct AttentionPairBarriers {
  Mbarrier owned_full[2];
  PipelineBarriers<Traits::template stages<0>> first;
  PipelineBarriers<Traits::template stages<1>> second;
  PipelineBarriers<Traits::pair_stages> pairs;
  PipelineBarriers<1> partial[2];                      // empty: the other block has read what was sent
  float numbers[Traits::all_stages][Traits::columns];  // of queries that pass: log2(e) lse, and d_out . out

  template <int I>
  __device__ auto& passing() {
    if constexpr (I == 0)
      return first;
    else
      return second;
  }
  __device__ void init() {
    for (Mbarrier& full : owned_full) full.init(1);
    first.init(1 + 32, 8);
    second.init(1 + 32, Traits::owns_queries ? 4 : 8);
    pairs.init(warpgroup_threads, warpgroup_threads);
    for (auto& of_group : partial) of_group.init(1, warpgroup_threads);
    fence_mbarrier_init();
  }
};

/// The tiles and barriers of a block; 0: Q and K, 1: d_out and V.
template <class Traits>
struct AttentionPairShared {
  AttentionPairBarriers<Traits>& barriers;
  std::byte* tiles;  // owned (2, atoms) of (rows x 64); passing (all_stages, atoms) of (columns x 64)
  uint4* pairs;      // (pair_stages, pair_vectors)
  float4* partials;  // (2, partial_vectors): what the other block of the cluster sent

  __device__ AttentionPairShared(AttentionPairBarriers<Traits>& barriers, void* dynamic)
      : barriers(barriers),
        tiles(at_atom_alignment(dynamic)),
        pairs(reinterpret_cast<uint4*>(owned(2) + Traits::all_stages * Traits::stage_bytes)),
        partials(reinterpret_cast<float4*>(pairs + Traits::pair_stages * Traits::pair_vectors)) {}

  __device__ std::byte* owned(int i) const { return tiles + i * Traits::owned_bytes; }
  template <int I>
  __device__ std::byte* passing() const {
    return owned(2) + (I == 0 ? 0 : Traits::template stages<0>)*Traits::stage_bytes;
  }
  template <int I>
  __device__ float* numbers(int stage) const {
    return barriers.numbers[(I == 0 ? 0 : Traits::template stages<0>)+stage];
  }
};

/// The tiles that pass: those of one head after the other.
template <class Traits>
struct PassingTile {
  const PassedRows& of;
  int head = 0, first;  // the tile's first column

  __device__ __forceinline__ explicit PassingTile(const PassedRows& of) : of(of), first(of.first_column) {}
  __device__ __forceinline__ bool more() const { return head < of.heads; }
  __device__ __forceinline__ void advance() {
    if ((first += Traits::columns) < of.columns) return;
    first = of.first_column;
    ++head;
  }
};

/// Loads the block's share, from dimension `column` on, of what it owns, then of tile after tile of what passes,
/// queries with a number each. A warp calls it.
template <int I, class Traits>
__device__ __forceinline__ void load_passing(const AttentionPairShared<Traits>& shared,
                                             const AttentionBackwardMaps& maps, const PassedRows& tile,
                                             const Tensor<float, 3>& sums, int column) {
  const int lane = threadIdx.x % 32;
  auto& barriers = shared.barriers.template passing<I>();
  const auto load = [&](std::byte* to, int atom, const CUtensorMap& map, TmaCoordinates at, Mbarrier& full) {
    for (int n = 0; n < Traits::atoms; ++n) {
      at.column = column + n * atom_columns;
      tma_load(to + n * atom, map, at, full);
    }
  };
  if (lane == 0) {
    auto& full = shared.barriers.owned_full[I];
    full.arrive_expect_tx(Traits::owned_bytes);
    load(shared.owned(I), Traits::owned_atom, maps.owned[I], tile.owned, full);
  }
  PipelineState<Traits::template stages<I>> at;
  for (PassingTile<Traits> next(tile); next.more(); next.advance(), at.advance()) {
    const int head = tile.passing.head + next.head, position = tile.passing.position + next.first;
    auto& full = barriers.full[at.stage];
    barriers.empty[at.stage].wait(at.phase + 1);
    if (lane == 0) {
      full.arrive_expect_tx(Traits::stage_bytes);
      load(shared.template passing<I>() + at.stage * Traits::stage_bytes, Traits::passing_atom, maps.passing[I],
           {0, head, position, tile.passing.row}, full);
    }
    if constexpr (!Traits::owns_queries)
      for (int c = lane; c < Traits::columns; c += 32)
        shared.template numbers<I>(at.stage)[c] =
            next.first + c < tile.columns ? sums(I, head, position + c) * (I == 0 ? log2_e : 1) : 0;
    full.arrive();
  }
}

/// A consumer: I is 0 for that of probabilities, 1 for that of scores.
template <class Traits, int I>
struct AttentionPairConsumer {
  static constexpr int columns = Traits::columns, steps = columns / 16;
  static constexpr bool has_sums = I == 1 || !Traits::owns_queries;
  using Pairs = OperandFragment<1, steps>;
  const AttentionPairShared<Traits>& shared;
  const PassedRows& tile;
  float scale;                     // of scores, times log2(e)
  std::uint64_t own, first, rows;  // shared-memory descriptors: what is owned, its ring, the ring of the sums
  PipelineState<Traits::template stages<I>> first_at = {};
  PipelineState<Traits::template stages<1 - I>> sums_at = {};
  PipelineState<Traits::pair_stages> pairs_at = {};
  PipelineState<1> partial_at = {};
  Fragment<1, columns / 8> s;                           // (64 x columns): S, P; dP, dS
  Pairs p;                                              // (64 x columns): P or dS, rounded
  Fragment<1, has_sums ? Traits::dims / 8 : 1> o = {};  // (64 x dims)
  float number[2];                                      // of the lane's rows, if they are queries

  __device__ __forceinline__ AttentionPairConsumer(const AttentionPairShared<Traits>& shared, const PassedRows& tile,
                                                   float scale, const Tensor<float, 3>& sums)
      : shared(shared),
        tile(tile),
        scale(scale),
        own(shared_descriptor(shared.owned(I))),
        first(shared_descriptor(shared.template passing<I>())),
        rows(shared_descriptor(shared.template passing<1 - I>(), Traits::passing_atom)) {
    if constexpr (Traits::owns_queries)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        number[r] =
            sums(I, tile.owned.head, tile.owned.position + ::min(row() + 8 * r, tile.rows - 1)) * (I == 0 ? log2_e : 1);
  }

  /// The lane's first row.
  static __device__ __forceinline__ int row() { return threadIdx.x / 32 % 4 * 16 + Fragment<1, 1>::first_row(); }
  static __device__ __forceinline__ int thread() { return threadIdx.x % warpgroup_threads; }

  static __device__ __forceinline__ void release(Mbarrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
  }

  __device__ __forceinline__ void begin_scores() {
    shared.barriers.template passing<I>().full[first_at.stage].wait(first_at.phase);
    wgmma_fence();
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        s, own, first + first_at.stage * descriptor_step(Traits::stage_bytes), false);
    wgmma_commit();
  }

  /// Adds the products of the other block, over the other dimensions. Both add the same two numbers.
  __device__ __forceinline__ void add_other_block() {
    auto& barriers = shared.barriers.partial[I];
    float4* const partial = shared.partials + I * Traits::partial_vectors + thread();
    const unsigned other = cluster_rank() ^ 1;
    barriers.empty[0].wait_for_cluster(partial_at.phase + 1);
    if (thread() == 0) barriers.full[0].arrive_expect_tx(Traits::partial_bytes);
#pragma unroll
    for (int n = 0; n < columns / 8; ++n)
      store_async(partial + n * warpgroup_threads, other, s.tile(0, n), barriers.full[0]);
    barriers.full[0].wait(partial_at.phase);
#pragma unroll
    for (int n = 0; n < columns / 8; ++n) {
      const float4 more = partial[n * warpgroup_threads];
      float(&tile)[4] = s.tile(0, n);
      tile[0] += more.x;
      tile[1] += more.y;
      tile[2] += more.z;
      tile[3] += more.w;
    }
    barriers.empty[0].arrive_at(other);
    partial_at.advance();
  }

  /// The number of the query of row r and column 8n + c of the lane.
  __device__ __forceinline__ float number_of(const float2* of_columns, int r, int n, int c) const {
    if constexpr (Traits::owns_queries) return number[r];
    return c == 0 ? of_columns[4 * n].x : of_columns[4 * n].y;
  }
  /// S becomes P.
  __device__ __forceinline__ void exponentiate(const float2* of_columns) {
#pragma unroll
    for (int n = 0; n < columns / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s.at(r, 2 * n + c);
          x = exp2_approximate(::fmaf(x, scale, -number_of(of_columns, r, n, c)));
        }
  }
  /// dP becomes dS, with P of the other warpgroup.
  __device__ __forceinline__ void multiply_pairs(const float2* of_columns) {
    shared.barriers.pairs.full[pairs_at.stage].wait(pairs_at.phase);
    const uint4* pairs = shared.pairs + pairs_at.stage * Traits::pair_vectors + thread();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const uint4 of_step = pairs[k * warpgroup_threads];
      const unsigned words[] = {of_step.x, of_step.y, of_step.z, of_step.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // as Fragment::operand() has them
        const int r = i % 2, n = 2 * k + i / 2;
        float &even = s.at(r, 2 * n), &odd = s.at(r, 2 * n + 1);
        even = __uint_as_float(words[i] << 16) * (even - number_of(of_columns, r, n, 0));
        odd = __uint_as_float(words[i] & 0xffff0000u) * (odd - number_of(of_columns, r, n, 1));
      }
    }
    shared.barriers.pairs.empty[pairs_at.stage].arrive();
    pairs_at.advance();
  }
  __device__ __forceinline__ void hand_on(const Pairs& pairs) {
    shared.barriers.pairs.empty[pairs_at.stage].wait(pairs_at.phase + 1);
    uint4* to = shared.pairs + pairs_at.stage * Traits::pair_vectors + thread();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const unsigned(&words)[4] = pairs.tile[0][k];
      to[k * warpgroup_threads] = {words[0], words[1], words[2], words[3]};
    }
    shared.barriers.pairs.full[pairs_at.stage].arrive();
    pairs_at.advance();
  }

  /// Zero where a key is after the query, or the column after the last. at: the tile's first column.
  __device__ __forceinline__ void mask(int at) {
    constexpr bool causal = I == 0, owns_queries = Traits::owns_queries;
    const int left = tile.columns - at, diagonal = tile.diagonal - at;
    const bool crossed = owns_queries ? columns - 1 > diagonal : Traits::rows - 1 + diagonal > 0;
    if (left >= columns && !(causal && crossed)) return;
    const int column = s.first_column(), last = row() + diagonal;
    s.for_each([&](float& x, int r, int c) {
      const bool hidden = owns_queries ? column + c > last + r : column + c < last + r;
      if (column + c >= left || (causal && hidden)) x = 0;
    });
  }

  /// Of the tile from column `at` on, whose products are done: s becomes P or dS.
  __device__ __forceinline__ void end_scores(int at) {
    fence_operand(s.sums);
    if constexpr (Traits::blocks > 1) add_other_block();
    const auto* of_columns =
        reinterpret_cast<const float2*>(shared.template numbers<I>(first_at.stage)) + threadIdx.x % 4;
    if constexpr (I == 0)
      exponentiate(of_columns);
    else
      multiply_pairs(of_columns);
    mask(at);
    release(shared.barriers.template passing<I>().empty[first_at.stage]);
    first_at.advance();
    if constexpr (I == 0) hand_on(s.operand());
  }

  __device__ __forceinline__ void begin_sums(int at) {
    shared.barriers.template passing<1 - I>().full[sums_at.stage].wait(sums_at.phase);
    const int valid = tile.columns - at;
    if (valid < columns)
      clear_rows<Traits::atoms>(shared.template passing<1 - I>() + sums_at.stage * Traits::stage_bytes,
                                Traits::passing_atom, valid, columns);
    const std::uint64_t y = rows + sums_at.stage * descriptor_step(Traits::stage_bytes);
    fence_operand(o.sums);
    fence_operand(p.tile[0]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < steps; ++k)
      add_values<Traits::passing_atom>(o, p.tile[0][k], y + descriptor_step(k * 16 * atom_row_bytes));
    wgmma_commit();
  }
  __device__ __forceinline__ void end_sums() {
    wgmma_wait<0>();
    fence_operand(o.sums);
    release(shared.barriers.template passing<1 - I>().empty[sums_at.stage]);
    sums_at.advance();
  }

  /// All tiles.
  __device__ __forceinline__ void run() {
    PassingTile<Traits> at(tile);
    shared.barriers.owned_full[I].wait(0);
    if constexpr (has_sums) {
      begin_scores();
      wgmma_wait<0>();
      end_scores(at.first);
      p = s.operand();
      int before = at.first;
      for (at.advance(); at.more(); at.advance()) {
        begin_scores();
        begin_sums(before);
        wgmma_wait<1>();
        end_scores(at.first);
        end_sums();
        p = s.operand();
        before = at.first;
      }
      begin_sums(before);
      end_sums();
    } else {
      for (; at.more(); at.advance()) {
        begin_scores();
        wgmma_wait<0>();
        end_scores(at.first);
      }
    }
  }

  /// Writes the sums, times `factor`; their first dimension is `column`.
  __device__ __forceinline__ void store(const QueryTile& of, int column, const AttentionShape& shape,
                                        const AttentionBackwardTensors<bf16>& at, float factor) const {
    of.store(o, RowValues<2>::filled(factor), threadIdx.x / 32 % 4 * 16, column, static_cast<int>(shape.head_dim),
             at.d_q);
  }
  __device__ __forceinline__ void store(const KeyTile<Traits::rows>& of, int column, const AttentionShape& shape,
                                        const AttentionBackwardTensors<bf16>& at, float factor) const {
    const int head_dim = static_cast<int>(shape.head_dim);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < o.columns; ++c)
        if (const int d = column + o.first_column() + 8 * (c / 2) + c % 2; row() + 8 * r < of.keys && d < head_dim)
          of.put(I == 0 ? at.d_v : at.d_k, row() + 8 * r, of.kv_head * shape.head_dim + d, factor * o.at(r, c));
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_backward_sm90_pairs_kernel(const __grid_constant__ AttentionBackwardMaps maps, AttentionShape shape,
                                         AttentionBackwardTensors<bf16> at, AttentionKeys<bf16> source,
                                         Sequences sequences) {
  if constexpr (has_wgmma) {
    __shared__ AttentionPairBarriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const typename Traits::Tile tile(Traits{}, shape, at, source, sequences);
    if (tile.rows == 0) return;
    const AttentionPairShared<Traits> shared(barriers, dynamic);
    const auto sync = [] {
      if constexpr (Traits::blocks > 1)
        cluster_sync();
      else
        __syncthreads();
    };
    if (threadIdx.x == 0) barriers.init();
    sync();

    const int group = threadIdx.x / warpgroup_threads;
    const int column = Traits::blocks > 1 ? static_cast<int>(cluster_rank()) * Traits::dims : 0;
    const float scale = static_cast<float>(shape.scale);
    if (group == 2) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int warp = threadIdx.x / 32 % 4;
      if (warp == 0)
        load_passing<0>(shared, maps, tile, at.sums, column);
      else if (warp == 1)
        load_passing<1>(shared, maps, tile, at.sums, column);
    } else if (group == 0) {
      setmaxnreg_inc<Traits::consumer_registers>();
      AttentionPairConsumer<Traits, 0> consumer(shared, tile, scale * log2_e, at.sums);
      consumer.run();
      if constexpr (consumer.has_sums) consumer.store(tile.tile, column, shape, at, 1);
    } else {
      setmaxnreg_inc<Traits::consumer_registers>();
      AttentionPairConsumer<Traits, 1> consumer(shared, tile, scale * log2_e, at.sums);
      consumer.run();
      consumer.store(tile.tile, column, shape, at, scale);
    }
    if constexpr (Traits::blocks > 1) cluster_sync();  // a block stays while the other may write into it
  }
}

}  // namespace zamba::kernel
