// SPDX-License-Identifier: MIT
// What a block of the backward pass by warpgroups owns, what passes by, its shared memory, and the producer that fills
// it: see backward_sm90.cuh.
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

/// Heads of at most Dims_ dimensions times Blocks_; a block owns Rows_ rows, tiles of Columns_ columns pass: Q or K in
/// a ring of FirstStages_ stages, d_out or V in one of SecondStages_.
template <bool OwnsQueries_, int Dims_, int Rows_, int Columns_, int FirstStages_, int SecondStages_, int Blocks_>
struct AttentionPassingTraits {
  static constexpr bool owns_queries = OwnsQueries_;
  static constexpr int dims = Dims_, rows = Rows_, columns = Columns_, blocks = Blocks_;
  static constexpr int consumers = 2, threads = (consumers + 1) * warpgroup_threads;
  template <int I>
  static constexpr int stages = I == 0 ? FirstStages_ : SecondStages_;
  static constexpr int all_stages = FirstStages_ + SecondStages_;
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int owned_atom = rows * atom_row_bytes, owned_bytes = atoms * owned_atom;
  static constexpr int passing_atom = columns * atom_row_bytes, stage_bytes = atoms * passing_atom;
  static constexpr std::size_t tile_bytes = atom_alignment + 2 * owned_bytes + all_stages * stage_bytes;
  static constexpr int consumer_registers = 232, producer_registers = 40;
  static_assert(registers_suffice<consumers + 1>(consumers * consumer_registers + producer_registers));

  using Tile = std::conditional_t<owns_queries, PassedQueries, PassedKeys<rows>>;
};

template <class Traits>
struct AttentionPassingBarriers {
  Mbarrier owned_full[2];
  PipelineBarriers<Traits::template stages<0>> first;
  PipelineBarriers<Traits::template stages<1>> second;
  float numbers[Traits::all_stages][Traits::columns];  // of queries that pass: see number_of_query()

  template <int I>
  __device__ auto& passing() {
    if constexpr (I == 0)
      return first;
    else
      return second;
  }
  /// For so many warps that read either ring.
  __device__ void init(unsigned first_readers, unsigned second_readers) {
    for (Mbarrier& full : owned_full) full.init(1);
    first.init(1 + 32, first_readers);
    second.init(1 + 32, second_readers);
  }
};

/// The tiles and barriers of a block; 0: Q and K, 1: d_out and V.
template <class Traits>
struct AttentionPassingShared {
  AttentionPassingBarriers<Traits>& barriers;
  std::byte* tiles;  // owned (2, atoms) of (rows x 64); passing (all_stages, atoms) of (columns x 64)

  __device__ AttentionPassingShared(AttentionPassingBarriers<Traits>& barriers, void* dynamic)
      : barriers(barriers), tiles(at_atom_alignment(dynamic)) {}

  __device__ std::byte* owned(int i) const { return tiles + i * Traits::owned_bytes; }
  template <int I>
  __device__ std::byte* passing(int stage = 0) const {
    return owned(2) + (stage + (I == 0 ? 0 : Traits::template stages<0>)) * Traits::stage_bytes;
  }
  template <int I>
  __device__ float* numbers(int stage) const {
    return barriers.numbers[stage + (I == 0 ? 0 : Traits::template stages<0>)];
  }

  /// Waits for a stage of ring I whose tile has `valid` columns. Beyond them it may hold anything, and P = 0 times NaN
  /// is NaN: of rings that sums read such rows become zero, cleared by Groups warpgroups together. Then all consumers
  /// wait for each other, before any of them reads the stage.
  template <int I, int Groups>
  __device__ __forceinline__ void wait_passing(const PipelineState<Traits::template stages<I>>& at, int valid) const {
    barriers.template passing<I>().full[at.stage].wait(at.phase);
    if (valid >= Traits::columns) return;
    constexpr int threads = Groups * warpgroup_threads, pieces = atom_row_bytes / sizeof(uint4);
    for (int i = valid * pieces + threadIdx.x % threads; i < Traits::columns * pieces; i += threads)
      for (int n = 0; n < Traits::atoms; ++n)
        *reinterpret_cast<uint4*>(passing<I>(at.stage) + n * Traits::passing_atom + i * sizeof(uint4)) = uint4{};
    fence_proxy_async();
    named_barrier_sync(1, Traits::consumers * warpgroup_threads);
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

/// What a query subtracts: from scores log2(e) lse, so that they become 2^exponent P; from dP d_out . out.
template <int I, class Traits>
__device__ __forceinline__ float number_of_query(const Tensor<float, 3>& sums, int head, int token) {
  const float number = sums(I, head, token);
  return I == 0 ? ::fmaf(number, log2_e, -Traits::pair_exponent) : number;
}

/// Loads the block's share, from dimension `column` on, of what it owns, then of tile after tile of what passes,
/// queries with a number each. A warp calls it.
template <int I, class Traits>
__device__ __forceinline__ void load_passing(const AttentionPassingShared<Traits>& shared,
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
      load(shared.template passing<I>(at.stage), Traits::passing_atom, maps.passing[I],
           {0, head, position, tile.passing.row}, full);
    }
    if constexpr (!Traits::owns_queries)
      for (int c = lane; c < Traits::columns; c += 32)
        shared.template numbers<I>(at.stage)[c] =
            next.first + c < tile.columns ? number_of_query<I, Traits>(sums, head, position + c) : 0;
    full.arrive();
  }
}

}  // namespace zamba::kernel
