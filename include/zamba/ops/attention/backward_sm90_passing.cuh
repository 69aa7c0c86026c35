// SPDX-License-Identifier: MIT
// What a block of backward_sm90_pairs.cuh owns, what passes by, its shared memory, and the producer that fills it.
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
  static constexpr int pair_vectors = columns / 16 * warpgroup_threads, pair_stages = 2;    // of P, in fp16
  static constexpr int partial_vectors = blocks > 1 ? columns / 8 * warpgroup_threads : 0;  // of S, in float
  static constexpr int partial_bytes = partial_vectors * static_cast<int>(sizeof(float4));
  static constexpr std::size_t shared_bytes = atom_alignment + 2 * owned_bytes + all_stages * stage_bytes +
                                              pair_stages * pair_vectors * sizeof(uint4) + 2 * partial_bytes;
  static constexpr int consumer_registers = 232, producer_registers = 40;
  static_assert(registers_suffice<3>(2 * consumer_registers + producer_registers));

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

/// P is passed on as 2^pair_exponent P in fp16: rounded to 11 bits from 2^-28 on, where bf16 would have 8, which d_k
/// would show.
inline constexpr int pair_exponent = 14;

/// What a query subtracts: from scores the logarithm of the sum, so that they become 2^pair_exponent P; from dP
/// d_out . out.
template <int I>
__device__ __forceinline__ float number_of_query(const Tensor<float, 3>& sums, int head, int token) {
  const float number = sums(I, head, token);
  return I == 0 ? ::fmaf(number, log2_e, -pair_exponent) : number;
}

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
            next.first + c < tile.columns ? number_of_query<I>(sums, head, position + c) : 0;
    full.arrive();
  }
}

}  // namespace zamba::kernel
