// SPDX-License-Identifier: MIT
// Prefill of narrow heads, of at most 256 dimensions, by wgmma and TMA, as FlashAttention-3: see prefill_sm90.cuh.
//
//   producer    one warpgroup: a thread loads Q and K, another V
//   consumers   two warpgroups of 64 queries each. The scores of a tile of keys are queued with the sums of the tile
//               before, and the two take turns ("ping-pong"): one exponentiates while the other multiplies
#pragma once

#include <cstdint>

#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Heads of at most Dims_ dimensions, keys and values in tiles of Keys_.
template <int Dims_, int Keys_>
struct PrefillSm90NarrowTraits {
  static constexpr int dims = Dims_, keys = Keys_;
  static constexpr int stages = 2, consumers = 2;  // of a ring; warpgroups
  static constexpr int queries = 64 * consumers, box_queries = queries, cluster = 1;
  static constexpr int threads = warpgroup_threads * (consumers + 1);
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int q_atom = queries * atom_row_bytes, key_atom = keys * atom_row_bytes;
  static constexpr int stage_bytes = atoms * key_atom;
  static constexpr std::size_t shared_bytes = atom_alignment + atoms * q_atom + 2 * stages * stage_bytes;
  static constexpr int box_keys = keys, box_values = keys;
  static constexpr int consumer_registers = 240, producer_registers = 24;
};

template <class Traits>
struct PrefillSm90NarrowBarriers {
  Mbarrier queries_full;
  PipelineBarriers<Traits::stages> keys, values;

  __device__ void init() {
    queries_full.init(1);
    keys.init(1, 4 * Traits::consumers);
    values.init(1, 4 * Traits::consumers);
    fence_mbarrier_init();
  }
};

/// The tiles and barriers of a block.
template <class Traits>
struct PrefillSm90NarrowShared {
  PrefillSm90NarrowBarriers<Traits>& barriers;
  std::byte* queries;  // (atoms) of (queries x 64)
  std::byte* keys;     // (stages, atoms) of (keys x 64)
  std::byte* values;   // (stages, atoms) of (keys x 64)

  __device__ PrefillSm90NarrowShared(PrefillSm90NarrowBarriers<Traits>& barriers, void* dynamic)
      : barriers(barriers),
        queries(at_atom_alignment(dynamic)),
        keys(queries + Traits::atoms * Traits::q_atom),
        values(keys + Traits::stages * Traits::stage_bytes) {}
};

/// Loads the queries, and the keys or the values of one tile after another into their ring. One thread of each of two
/// warps calls it.
template <class Traits>
__device__ __forceinline__ void load_narrow_tiles(const PrefillSm90NarrowShared<Traits>& shared,
                                                  const AttentionTensorMaps& maps, const QueryTile& tile, int kv_head,
                                                  bool values) {
  auto& queries_full = shared.barriers.queries_full;
  if (!values) {
    queries_full.arrive_expect_tx(Traits::atoms * Traits::q_atom);
    for (int n = 0; n < Traits::atoms; ++n)
      tma_load(shared.queries + n * Traits::q_atom, maps.q, {n * atom_columns, tile.head, tile.token, 0}, queries_full);
  }
  auto& barriers = values ? shared.barriers.values : shared.barriers.keys;
  const CUtensorMap& from = values ? maps.v : maps.k;
  PipelineState<Traits::stages> at;
  for (int j = 0; j < ceil_div(tile.keys, Traits::keys); ++j, at.advance()) {
    barriers.empty[at.stage].wait(at.phase + 1);
    barriers.full[at.stage].arrive_expect_tx(Traits::stage_bytes);
    std::byte* to = (values ? shared.values : shared.keys) + at.stage * Traits::stage_bytes;
    for (int n = 0; n < Traits::atoms; ++n)
      tma_load(to + n * Traits::key_atom, from,
               {n * atom_columns, kv_head, tile.first_key + j * Traits::keys, tile.row}, barriers.full[at.stage]);
  }
}

/// A consumer: S = Q K^T and O += P V of 64 queries. Products are begun and ended apart, so that others overlap.
template <class Traits>
struct PrefillSm90NarrowConsumer {
  static constexpr int keys = Traits::keys;
  const PrefillSm90NarrowShared<Traits>& shared;
  const QueryTile& tile;
  int group, row;  // the warpgroup; the warp's first query
  float scale;
  std::uint64_t q, first_k, first_v;  // shared-memory descriptors
  PipelineState<Traits::stages> k_at = {}, v_at = {};
  Fragment<1, keys / 8> s;               // (64 x keys): S, then P
  OperandFragment<1, keys / 16> p;       // (64 x keys): P rounded
  Fragment<1, Traits::dims / 8> o = {};  // (64 x dims)
  OnlineSoftmax<2> softmax = {};
  RowValues<2> rescale;

  __device__ __forceinline__ PrefillSm90NarrowConsumer(const PrefillSm90NarrowShared<Traits>& shared,
                                                       const QueryTile& tile, int group, float scale)
      : shared(shared),
        tile(tile),
        group(group),
        row(threadIdx.x / 32 * 16),
        scale(scale),
        q(shared_descriptor(shared.queries + 64 * group * atom_row_bytes)),
        first_k(shared_descriptor(shared.keys)),
        first_v(shared_descriptor(shared.values, Traits::key_atom)) {}

  __device__ __forceinline__ void begin_scores() {
    shared.barriers.keys.full[k_at.stage].wait(k_at.phase);
    wgmma_fence();
    multiply_keys<Traits::dims / 16, Traits::q_atom, Traits::key_atom>(
        s, q, first_k + k_at.stage * descriptor_step(Traits::stage_bytes), false);
    wgmma_commit();
  }
  /// Of tile j, whose products are done: P, and rescale.
  __device__ __forceinline__ void end_scores(int j) {
    fence_operand(s.sums);
    if (threadIdx.x % 32 == 0) shared.barriers.keys.empty[k_at.stage].arrive();
    k_at.advance();
    if ((j + 1) * keys - 1 > tile.position + 64 * group) s.mask_after(tile.position + row - j * keys);
    rescale = softmax.update(s, scale);
  }
  /// Of `valid` keys, at most a tile.
  __device__ __forceinline__ void begin_sums(int valid) {
    shared.barriers.values.full[v_at.stage].wait(v_at.phase);
    if (valid < keys)
      clear_rows<Traits::atoms>(shared.values + v_at.stage * Traits::stage_bytes, Traits::key_atom, valid, keys);
    const std::uint64_t v = first_v + v_at.stage * descriptor_step(Traits::stage_bytes);
    fence_operand(o.sums);
    fence_operand(p.tile[0]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < keys / 16; ++k)
      add_values<Traits::key_atom>(o, p.tile[0][k], v + descriptor_step(k * 16 * atom_row_bytes));
    wgmma_commit();
  }
  __device__ __forceinline__ void end_sums() {
    wgmma_wait<0>();
    fence_operand(o.sums);
    if (threadIdx.x % 32 == 0) shared.barriers.values.empty[v_at.stage].arrive();
    v_at.advance();
  }

  /// Named barriers by which the consumers take turns at the tensor cores.
  __device__ __forceinline__ void await_turn() const {
    named_barrier_sync(Traits::consumers + 1 + group, 2 * warpgroup_threads);
  }
  __device__ __forceinline__ void end_turn() const {
    named_barrier_arrive(Traits::consumers + 1 + (group + 1) % Traits::consumers, 2 * warpgroup_threads);
  }

  /// All tiles: O and the softmax.
  __device__ __forceinline__ void run() {
    const int count = ceil_div(tile.keys, keys);
    const bool last_group = group + 1 == Traits::consumers;
    if (last_group) end_turn();
    shared.barriers.queries_full.wait(0);
    await_turn();
    begin_scores();
    if (!last_group || 1 < count) end_turn();
    wgmma_wait<0>();
    end_scores(0);
    p = s.operand();
    for (int j = 1; j < count; ++j) {
      await_turn();
      begin_scores();
      begin_sums(keys);  // of tile j - 1
      if (!last_group || j + 1 < count) end_turn();
      wgmma_wait<1>();
      end_scores(j);
      end_sums();
      o.scale_rows(rescale);
      p = s.operand();
    }
    begin_sums(tile.keys - (count - 1) * keys);
    end_sums();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_prefill_sm90_narrow_kernel(const __grid_constant__ AttentionTensorMaps maps, AttentionShape shape,
                                         Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                                         AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  if constexpr (has_wgmma) {
    __shared__ PrefillSm90NarrowBarriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
    if (tile.tokens == 0) return;
    const PrefillSm90NarrowShared<Traits> shared(barriers, dynamic);
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();

    const int group = threadIdx.x / warpgroup_threads;
    if (group == Traits::consumers) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int warp = threadIdx.x / 32 % 4, kv_head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
      if (threadIdx.x % 32 == 0 && warp < 2) load_narrow_tiles(shared, maps, tile, kv_head, warp == 1);
    } else {
      setmaxnreg_inc<Traits::consumer_registers>();
      PrefillSm90NarrowConsumer<Traits> consumer(shared, tile, group, static_cast<float>(shape.scale) * log2_e);
      consumer.run();
      const auto total = consumer.softmax.total();
      tile.store_lse(consumer.softmax, total, consumer.row, static_cast<float>(shape.scale), lse);
      tile.store(consumer.o, total.reciprocal(), consumer.row, 0, static_cast<int>(shape.head_dim), out);
    }
  }
}

}  // namespace zamba::kernel
