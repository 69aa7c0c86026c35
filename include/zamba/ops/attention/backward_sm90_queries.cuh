// SPDX-License-Identifier: MIT
// Gradients of queries by wgmma and TMA: see backward_sm90.cuh. A block owns 128 queries; tiles of keys pass by, K and
// V in a ring each.
//
//   consumers   two warpgroups of 64 queries each: S = Q K^T, dP = d_out V^T, dS, d_q += dS K
//   producer    one warpgroup: a thread loads Q and K, another d_out and V
//
// Products of a tile are queued with the sums of the tile before.
#pragma once

#include <cstdint>

#include <zamba/ops/attention/backward_sm90_passing.cuh>
#include <zamba/ops/attention/backward_tile.cuh>
#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Heads of at most Dims_ dimensions, tiles of Keys_ keys. Keys are read again for the sums, a tile later, so that they
/// have more stages than values.
template <int Dims_, int Keys_, int ValueStages_>
struct QueryGradientSm90Traits {
  static constexpr int dims = Dims_, keys = Keys_, key_stages = 3, value_stages = ValueStages_, consumers = 2;
  static constexpr int queries = 64 * consumers, rows = queries, columns = keys, blocks = 1,
                       threads = warpgroup_threads * (consumers + 1);
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int owned_atom = queries * atom_row_bytes, owned_bytes = atoms * owned_atom;
  static constexpr int passing_atom = keys * atom_row_bytes, stage_bytes = atoms * passing_atom;
  static constexpr std::size_t shared_bytes =
      atom_alignment + 2 * owned_bytes + (key_stages + value_stages) * stage_bytes;
  static constexpr int consumer_registers = 240, producer_registers = 24;
  static_assert(registers_suffice<consumers + 1>(consumers * consumer_registers + producer_registers));
  static constexpr bool owns_queries = true;
};

template <class Traits>
struct QueryGradientSm90Barriers {
  Mbarrier owned_full[2];
  PipelineBarriers<Traits::key_stages> keys;
  PipelineBarriers<Traits::value_stages> values;

  __device__ void init() {
    for (Mbarrier& full : owned_full) full.init(1);
    keys.init(1, 4 * Traits::consumers);
    values.init(1, 4 * Traits::consumers);
    fence_mbarrier_init();
  }
};

/// The tiles and barriers of a block.
template <class Traits>
struct QueryGradientSm90Shared {
  QueryGradientSm90Barriers<Traits>& barriers;
  std::byte* owned;   // (2, atoms) of (queries x 64): Q, d_out
  std::byte* keys;    // (key_stages, atoms) of (keys x 64)
  std::byte* values;  // (value_stages, atoms) of (keys x 64)

  __device__ QueryGradientSm90Shared(QueryGradientSm90Barriers<Traits>& barriers, void* dynamic)
      : barriers(barriers),
        owned(at_atom_alignment(dynamic)),
        keys(owned + 2 * Traits::owned_bytes),
        values(keys + Traits::key_stages * Traits::stage_bytes) {}
};

/// Loads what the block owns, Q or d_out, then tile after tile of keys or values. One thread.
template <class Traits, int Stages>
__device__ __forceinline__ void load_passing_keys(const QueryGradientSm90Shared<Traits>& shared,
                                                  const AttentionBackwardMaps& maps, const QueryTile& tile, int kv_head,
                                                  int i, PipelineBarriers<Stages>& barriers, std::byte* stages) {
  auto& owned_full = shared.barriers.owned_full[i];
  owned_full.arrive_expect_tx(Traits::owned_bytes);
  for (int n = 0; n < Traits::atoms; ++n)
    tma_load(shared.owned + i * Traits::owned_bytes + n * Traits::owned_atom, maps.owned[i],
             {n * atom_columns, tile.head, tile.token, 0}, owned_full);
  PipelineState<Stages> at;
  for (int first = 0; first < tile.keys; first += Traits::keys, at.advance()) {
    auto& full = barriers.full[at.stage];
    barriers.empty[at.stage].wait(at.phase + 1);
    full.arrive_expect_tx(Traits::stage_bytes);
    for (int n = 0; n < Traits::atoms; ++n)
      tma_load(stages + at.stage * Traits::stage_bytes + n * Traits::passing_atom, maps.passing[i],
               {n * atom_columns, kv_head, tile.first_key + first, tile.row}, full);
  }
}

/// A consumer: d_q of 64 queries.
template <class Traits>
struct QueryGradientConsumer {
  static constexpr int keys = Traits::keys;
  const QueryGradientSm90Shared<Traits>& shared;
  const QueryTile& tile;
  int row;                                         // the warp's first query
  float scale;                                     // of scores, times log2(e)
  std::uint64_t q, d_out, first_k, first_v, rows;  // shared-memory descriptors; rows: of keys, for the sums
  PipelineState<Traits::key_stages> k_at = {}, sums_at = {};
  PipelineState<Traits::value_stages> v_at = {};
  Fragment<1, keys / 8> s, d_p;          // (64 x keys): S, then P; dP
  OperandFragment<1, keys / 16> d_s;     // (64 x keys), rounded
  Fragment<1, Traits::dims / 8> o = {};  // (64 x dims)
  float lse[2], dot[2];                  // log2(e) lse, and d_out . out of the lane's queries

  __device__ __forceinline__ QueryGradientConsumer(const QueryGradientSm90Shared<Traits>& shared, const QueryTile& tile,
                                                   int group, float scale, const Tensor<float, 3>& sums)
      : shared(shared),
        tile(tile),
        row(64 * group + threadIdx.x / 32 % 4 * 16),
        scale(scale),
        q(shared_descriptor(shared.owned + 64 * group * atom_row_bytes)),
        d_out(shared_descriptor(shared.owned + Traits::owned_bytes + 64 * group * atom_row_bytes)),
        first_k(shared_descriptor(shared.keys)),
        first_v(shared_descriptor(shared.values)),
        rows(shared_descriptor(shared.keys, Traits::passing_atom)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = tile.token + ::min(row + s.first_row() + 8 * r, tile.tokens - 1);
      lse[r] = sums(0, tile.head, token) * log2_e;
      dot[r] = sums(1, tile.head, token);
    }
  }

  __device__ __forceinline__ void begin_scores() {
    shared.barriers.keys.full[k_at.stage].wait(k_at.phase);
    shared.barriers.values.full[v_at.stage].wait(v_at.phase);
    wgmma_fence();
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        s, q, first_k + k_at.stage * descriptor_step(Traits::stage_bytes), false);
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        d_p, d_out, first_v + v_at.stage * descriptor_step(Traits::stage_bytes), false);
    wgmma_commit();
    k_at.advance();
  }
  /// Of the tile from key `first` on, whose products are done: S becomes dS.
  __device__ __forceinline__ void end_scores(int first) {
    fence_operand(s.sums);
    fence_operand(d_p.sums);
    if (threadIdx.x % 32 == 0) shared.barriers.values.empty[v_at.stage].arrive();
    v_at.advance();
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < s.columns; ++c)
        s.at(r, c) = exp2_approximate(::fmaf(s.at(r, c), scale, -lse[r])) * (d_p.at(r, c) - dot[r]);
    if (first + keys - 1 <= tile.position + row) return;
    const int reach = tile.position + row + s.first_row() - first - s.first_column();
    s.for_each([&](float& x, int r, int c) {
      if (c > reach + r) x = 0;
    });
  }
  /// d_q += dS K of the tile from key `first` on.
  __device__ __forceinline__ void begin_sums(int first) {
    const int valid = tile.keys - first;
    if (valid < keys)
      clear_rows<Traits::atoms>(shared.keys + sums_at.stage * Traits::stage_bytes, Traits::passing_atom, valid, keys);
    const std::uint64_t k = rows + sums_at.stage * descriptor_step(Traits::stage_bytes);
    fence_operand(o.sums);
    fence_operand(d_s.tile[0]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < keys / 16; ++i)
      add_values<Traits::passing_atom>(o, d_s.tile[0][i], k + descriptor_step(i * 16 * atom_row_bytes));
    wgmma_commit();
  }
  __device__ __forceinline__ void end_sums() {
    wgmma_wait<0>();
    fence_operand(o.sums);
    if (threadIdx.x % 32 == 0) shared.barriers.keys.empty[sums_at.stage].arrive();
    sums_at.advance();
  }

  /// All tiles.
  __device__ __forceinline__ void run() {
    shared.barriers.owned_full[0].wait(0);
    shared.barriers.owned_full[1].wait(0);
    begin_scores();
    wgmma_wait<0>();
    end_scores(0);
    d_s = s.operand();
    int first = keys;
    for (; first < tile.keys; first += keys) {
      begin_scores();
      begin_sums(first - keys);
      wgmma_wait<1>();
      end_scores(first);
      end_sums();
      d_s = s.operand();
    }
    begin_sums(first - keys);
    end_sums();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_backward_sm90_queries_kernel(const __grid_constant__ AttentionBackwardMaps maps, AttentionShape shape,
                                           AttentionBackwardTensors<bf16> at, AttentionKeys<bf16> source,
                                           Sequences sequences) {
  if constexpr (has_wgmma) {
    __shared__ QueryGradientSm90Barriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const auto tile =
        QueryTile::of_block<Traits::queries>(shape, at.q, source, sequences, AttentionRows{1, sequences.longest});
    if (tile.tokens == 0) return;
    const QueryGradientSm90Shared<Traits> shared(barriers, dynamic);
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();

    const int group = threadIdx.x / warpgroup_threads;
    if (group == Traits::consumers) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int warp = threadIdx.x / 32 % 4, kv_head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
      if (threadIdx.x % 32 == 0 && warp == 0)
        load_passing_keys(shared, maps, tile, kv_head, 0, barriers.keys, shared.keys);
      else if (threadIdx.x % 32 == 0 && warp == 1)
        load_passing_keys(shared, maps, tile, kv_head, 1, barriers.values, shared.values);
    } else {
      setmaxnreg_inc<Traits::consumer_registers>();
      const float scale = static_cast<float>(shape.scale);
      QueryGradientConsumer<Traits> consumer(shared, tile, group, scale * log2_e, at.sums);
      consumer.run();
      tile.store(consumer.o, RowValues<2>::filled(scale), consumer.row, 0, static_cast<int>(shape.head_dim), at.d_q);
    }
  }
}

}  // namespace zamba::kernel
