// SPDX-License-Identifier: MIT
// Gradients of keys and values by wgmma and TMA: see backward_sm90.cuh. A block owns 64 keys; tiles of queries pass by,
// Q and d_out in a ring each.
//
//   values      warpgroup 0: S^T = K Q^T and P, which it hands on through shared memory; d_v += P^T d_out
//   keys        warpgroup 1: dP^T = V d_out^T, and with P dS; d_k += dS^T Q
//   producer    warpgroup 2: a warp loads K and Q with lse, another V and d_out with d_out . out
//
// Products of a tile are queued with the sums of the tile before, so that the tensor cores work while P and dS are
// computed.
#pragma once

#include <cstdint>

#include <zamba/ops/attention/backward_tile.cuh>
#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Q or K, and d_out or V: those that a block owns, and those that pass by.
struct AttentionBackwardMaps {
  CUtensorMap owned[2], passing[2];
};

/// Heads of at most Dims_ dimensions, tiles of Queries_ queries, Stages_ of either ring. The warpgroup of keys reads Q
/// long after the other one, which has P to compute before: two stages would keep it waiting.
template <int Dims_, int Queries_, int Stages_>
struct KeyGradientSm90Traits {
  static constexpr int dims = Dims_, queries = Queries_, keys = 64, stages = Stages_;
  static constexpr int threads = 3 * warpgroup_threads;
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int owned_atom = keys * atom_row_bytes, owned_bytes = atoms * owned_atom;
  static constexpr int passing_atom = queries * atom_row_bytes, stage_bytes = atoms * passing_atom;
  static constexpr int pair_vectors = queries / 16 * warpgroup_threads;  // of 16 bytes: P (keys x queries) in bf16
  static constexpr int pair_stages = 2;
  static constexpr std::size_t shared_bytes =
      atom_alignment + 2 * (owned_bytes + stages * stage_bytes) + pair_stages * pair_vectors * sizeof(uint4);
  static constexpr int consumer_registers = 240, producer_registers = 32;

  using Tile = KeyTile<keys>;
};

template <class Traits>
struct KeyGradientSm90Barriers {
  Mbarrier owned_full[2];
  PipelineBarriers<Traits::stages> passing[2];
  PipelineBarriers<Traits::pair_stages> pairs;
  float numbers[2][Traits::stages][Traits::queries];  // log2(e) lse, and d_out . out

  __device__ void init() {
    for (int i = 0; i < 2; ++i) {
      owned_full[i].init(1);
      passing[i].init(1 + 32, 8);
    }
    pairs.init(warpgroup_threads, warpgroup_threads);
    fence_mbarrier_init();
  }
};

/// The tiles and barriers of a block; 0: K and Q, 1: V and d_out.
template <class Traits>
struct KeyGradientSm90Shared {
  KeyGradientSm90Barriers<Traits>& barriers;
  std::byte* tiles;  // owned (2, atoms) of (keys x 64); passing (2, stages, atoms) of (queries x 64)
  uint4* pairs;      // (pair_stages, pair_vectors)

  __device__ KeyGradientSm90Shared(KeyGradientSm90Barriers<Traits>& barriers, void* dynamic)
      : barriers(barriers), tiles(at_atom_alignment(dynamic)), pairs(reinterpret_cast<uint4*>(passing(2))) {}

  __device__ std::byte* owned(int i) const { return tiles + i * Traits::owned_bytes; }
  __device__ std::byte* passing(int i) const { return owned(2) + i * Traits::stages * Traits::stage_bytes; }
};

/// The tiles of queries that pass a tile of keys: those of one head after the other.
template <class Traits>
struct PassingQueries {
  const typename Traits::Tile& tile;
  int group;            // heads that share the keys
  int head = 0, first;  // the head in the group; the tile's first query, counted from the row's first

  __device__ __forceinline__ PassingQueries(const typename Traits::Tile& tile, const AttentionShape& shape)
      : tile(tile), group(static_cast<int>(shape.heads / shape.kv_heads)), first(tile.first_query()) {}
  __device__ __forceinline__ bool more() const { return head < group; }
  __device__ __forceinline__ void advance() {
    if ((first += Traits::queries) < tile.of.tokens) return;
    first = tile.first_query();
    ++head;
  }
};

/// Loads what the block owns, then tile after tile of what passes, with a number of each query. A warp calls it.
template <class Traits>
__device__ __forceinline__ void load_passing_queries(const KeyGradientSm90Shared<Traits>& shared,
                                                     const AttentionBackwardMaps& maps,
                                                     const typename Traits::Tile& tile, const AttentionShape& shape,
                                                     const Tensor<float, 3>& sums, bool cached, int i) {
  const int lane = threadIdx.x % 32, begin = static_cast<int>(tile.of.begin);
  auto& barriers = shared.barriers.passing[i];
  if (lane == 0) {
    auto& full = shared.barriers.owned_full[i];
    full.arrive_expect_tx(Traits::owned_bytes);
    for (int n = 0; n < Traits::atoms; ++n)
      tma_load(shared.owned(i) + n * Traits::owned_atom, maps.owned[i],
               {n * atom_columns, tile.kv_head, tile.first + (cached ? 0 : begin),
                cached ? static_cast<int>(tile.of.row) : 0},
               full);
  }
  PipelineState<Traits::stages> at;
  for (PassingQueries<Traits> next(tile, shape); next.more(); next.advance(), at.advance()) {
    const int head = tile.kv_head * next.group + next.head;
    auto& full = barriers.full[at.stage];
    barriers.empty[at.stage].wait(at.phase + 1);
    if (lane == 0) {
      full.arrive_expect_tx(Traits::stage_bytes);
      std::byte* to = shared.passing(i) + at.stage * Traits::stage_bytes;
      for (int n = 0; n < Traits::atoms; ++n)
        tma_load(to + n * Traits::passing_atom, maps.passing[i], {n * atom_columns, head, begin + next.first, 0}, full);
    }
    const float* numbers = &sums(i, head, begin + next.first);
    for (int q = lane; q < Traits::queries; q += 32)
      shared.barriers.numbers[i][at.stage][q] =
          next.first + q < tile.of.tokens ? numbers[q] * (i == 0 ? log2_e : 1) : 0;
    full.arrive();
  }
}

/// A consumer: of values, or of keys.
template <class Traits, bool OfValues>
struct KeyGradientConsumer {
  static constexpr int queries = Traits::queries, steps = queries / 16;
  static constexpr int first_ring = OfValues ? 0 : 1, sums_ring = 1 - first_ring;
  using Pairs = OperandFragment<1, steps>;
  const KeyGradientSm90Shared<Traits>& shared;
  const typename Traits::Tile& tile;
  float scale;                     // of scores, times log2(e)
  std::uint64_t own, first, rows;  // shared-memory descriptors: what is owned, its ring, the ring of the sums
  PipelineState<Traits::stages> first_at = {}, sums_at = {};
  PipelineState<Traits::pair_stages> pairs_at = {};
  Fragment<1, queries / 8> s;            // (64 x queries): S^T, P^T; dP^T, dS^T
  Pairs p;                               // (64 x queries): P^T or dS^T, rounded
  Fragment<1, Traits::dims / 8> o = {};  // (64 x dims)

  __device__ __forceinline__ KeyGradientConsumer(const KeyGradientSm90Shared<Traits>& shared,
                                                 const typename Traits::Tile& tile, float scale)
      : shared(shared),
        tile(tile),
        scale(scale),
        own(shared_descriptor(shared.owned(first_ring))),
        first(shared_descriptor(shared.passing(first_ring))),
        rows(shared_descriptor(shared.passing(sums_ring), Traits::passing_atom)) {}

  static __device__ __forceinline__ void release(Mbarrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
  }

  __device__ __forceinline__ void begin_scores() {
    shared.barriers.passing[first_ring].full[first_at.stage].wait(first_at.phase);
    wgmma_fence();
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        s, own, first + first_at.stage * descriptor_step(Traits::stage_bytes), false);
    wgmma_commit();
  }

  /// S^T becomes P^T.
  __device__ __forceinline__ void exponentiate(const float2* lse) {
#pragma unroll
    for (int n = 0; n < queries / 8; ++n) {
      const float2 of_column = lse[4 * n];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        s.at(r, 2 * n) = exp2_approximate(::fmaf(s.at(r, 2 * n), scale, -of_column.x));
        s.at(r, 2 * n + 1) = exp2_approximate(::fmaf(s.at(r, 2 * n + 1), scale, -of_column.y));
      }
    }
  }
  /// dP^T becomes dS^T, with P^T of the other warpgroup.
  __device__ __forceinline__ void multiply_pairs(const float2* dot) {
    shared.barriers.pairs.full[pairs_at.stage].wait(pairs_at.phase);
    const uint4* pairs = shared.pairs + pairs_at.stage * Traits::pair_vectors + threadIdx.x % warpgroup_threads;
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const uint4 of_step = pairs[k * warpgroup_threads];
      const unsigned words[] = {of_step.x, of_step.y, of_step.z, of_step.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // as Fragment::operand() has them
        const int r = i % 2, n = 2 * k + i / 2;
        const float2 of_column = dot[4 * n];
        s.at(r, 2 * n) = __uint_as_float(words[i] << 16) * (s.at(r, 2 * n) - of_column.x);
        s.at(r, 2 * n + 1) = __uint_as_float(words[i] & 0xffff0000u) * (s.at(r, 2 * n + 1) - of_column.y);
      }
    }
    shared.barriers.pairs.empty[pairs_at.stage].arrive();
    pairs_at.advance();
  }
  __device__ __forceinline__ void hand_on(const Pairs& next) {
    shared.barriers.pairs.empty[pairs_at.stage].wait(pairs_at.phase + 1);
    uint4* pairs = shared.pairs + pairs_at.stage * Traits::pair_vectors + threadIdx.x % warpgroup_threads;
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const unsigned(&words)[4] = next.tile[0][k];
      pairs[k * warpgroup_threads] = {words[0], words[1], words[2], words[3]};
    }
    shared.barriers.pairs.full[pairs_at.stage].arrive();
    pairs_at.advance();
  }

  /// Zero where a key is after the query, or the query after the row's last. query: the tile's first.
  __device__ __forceinline__ void mask(int query) {
    const int left = tile.of.tokens - query, past_diagonal = tile.of.past + query - tile.first;
    const bool any = left < queries || (OfValues && past_diagonal < Traits::keys - 1);
    if (!any) return;
    const int row = threadIdx.x / 32 % 4 * 16 + s.first_row(), column = s.first_column();
    s.for_each([&](float& x, int r, int c) {
      if (column + c >= left || (OfValues && column + c + past_diagonal < row + r)) x = 0;
    });
  }

  /// Of the tile from `query` on, whose products are done: P^T or dS^T.
  __device__ __forceinline__ void end_scores(int query) {
    fence_operand(s.sums);
    auto& barriers = shared.barriers;
    const auto* numbers =
        reinterpret_cast<const float2*>(barriers.numbers[first_ring][first_at.stage]) + threadIdx.x % 4;
    if constexpr (OfValues)
      exponentiate(numbers);
    else
      multiply_pairs(numbers);
    mask(query);
    release(barriers.passing[first_ring].empty[first_at.stage]);
    first_at.advance();
    if constexpr (OfValues) hand_on(s.operand());
  }

  __device__ __forceinline__ void begin_sums(int query) {
    shared.barriers.passing[sums_ring].full[sums_at.stage].wait(sums_at.phase);
    const int valid = tile.of.tokens - query;
    if (valid < queries)
      clear_rows<Traits::atoms>(shared.passing(sums_ring) + sums_at.stage * Traits::stage_bytes, Traits::passing_atom,
                                valid, queries);
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
    release(shared.barriers.passing[sums_ring].empty[sums_at.stage]);
    sums_at.advance();
  }

  /// All tiles.
  __device__ __forceinline__ void run(const AttentionShape& shape) {
    PassingQueries<Traits> at(tile, shape);
    shared.barriers.owned_full[first_ring].wait(0);
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
  }

  __device__ __forceinline__ void store(const AttentionShape& shape, const KeyGradients<bf16>& to, float factor) const {
    const int row = threadIdx.x / 32 % 4 * 16 + o.first_row(), head_dim = static_cast<int>(shape.head_dim);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < o.columns; ++c)
        if (const int d = o.first_column() + 8 * (c / 2) + c % 2; row + 8 * r < tile.keys && d < head_dim)
          tile.put(to, row + 8 * r, tile.kv_head * shape.head_dim + d, factor * o.at(r, c));
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_backward_sm90_keys_kernel(const __grid_constant__ AttentionBackwardMaps maps, AttentionShape shape,
                                        AttentionBackwardTensors<bf16> at, AttentionKeys<bf16> source,
                                        Sequences sequences) {
  if constexpr (has_wgmma) {
    __shared__ KeyGradientSm90Barriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const auto tile = Traits::Tile::of_block(shape, source, sequences, bool(at.d_k.cache));
    if (tile.keys == 0) return;
    const KeyGradientSm90Shared<Traits> shared(barriers, dynamic);
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();

    const int group = threadIdx.x / warpgroup_threads;
    const float scale = static_cast<float>(shape.scale);
    if (group == 2) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int warp = threadIdx.x / 32 % 4;
      if (warp < 2) load_passing_queries(shared, maps, tile, shape, at.sums, source.cached, warp);
    } else if (group == 0) {
      setmaxnreg_inc<Traits::consumer_registers>();
      KeyGradientConsumer<Traits, true> consumer(shared, tile, scale * log2_e);
      consumer.run(shape);
      consumer.store(shape, at.d_v, 1);
    } else {
      setmaxnreg_inc<Traits::consumer_registers>();
      KeyGradientConsumer<Traits, false> consumer(shared, tile, scale * log2_e);
      consumer.run(shape);
      consumer.store(shape, at.d_k, scale);
    }
  }
}

}  // namespace zamba::kernel
