// SPDX-License-Identifier: MIT
// Prefill of wide heads, of 257 to 512 dimensions, by wgmma and TMA: see prefill_sm90.cuh. No warpgroup has registers
// for all dimensions of 64 queries, so a block of 64 queries divides them among four:
//
//   scores      warpgroup 0: S = Q K^T and P, which passes through shared memory with its rescale
//   sums        warpgroups 1 and 2: O += P V, of 256 dimensions the first, of the rest the second
//   producer    warpgroup 3: a thread loads Q and K, another V
//
// Two blocks of neighbouring queries are a cluster: each loads half of every stage, by multicast to both.
#pragma once

#include <cstdint>

#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Heads of more than 256 and at most Dims_ dimensions.
template <int Dims_>
struct PrefillSm90WideTraits {
  static constexpr int dims = Dims_, first_dims = 256, other_dims = dims - first_dims;
  static constexpr int cluster = 2, queries = 64 * cluster, box_queries = 64, keys = 64;
  static constexpr int threads = warpgroup_threads * 4;
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int q_atom = box_queries * atom_row_bytes;
  // A stage of keys is two atoms of 64 keys; one of values is all atoms of 16 values, eight always, so each block of
  // the cluster loads half of them.
  static constexpr int key_atom = keys * atom_row_bytes, stage_atoms = 2, stage_dims = stage_atoms * atom_columns;
  static constexpr int key_stages = 4, key_slabs = ceil_div(dims, stage_dims);
  static constexpr int stage_values = 16, value_atom = stage_values * atom_row_bytes, value_atoms = 8;
  static constexpr int value_stages = 5, value_slabs = keys / stage_values;
  static constexpr int stage_bytes = stage_atoms * key_atom;
  static_assert(stage_bytes == value_atoms * value_atom && dims <= value_atoms * atom_columns);
  static constexpr int probability_bytes = box_queries * atom_row_bytes;
  static constexpr std::size_t shared_bytes =
      atom_alignment + atoms * q_atom + (key_stages + value_stages) * stage_bytes + 2 * probability_bytes;
  static constexpr int box_keys = keys, box_values = stage_values;
  static constexpr int score_registers = 112, sum_registers = 184, producer_registers = 24;
};

template <class Traits>
struct PrefillSm90WideBarriers {
  Mbarrier queries_full;
  PipelineBarriers<2> probabilities;
  PipelineBarriers<Traits::key_stages> keys;
  PipelineBarriers<Traits::value_stages> values;
  float rescale[2][64];  // by stage of the probabilities and row

  __device__ void init() {
    queries_full.init(1);
    keys.init(1, 4 * Traits::cluster);
    values.init(1, 8 * Traits::cluster);
    probabilities.init(warpgroup_threads, 2 * warpgroup_threads);
    fence_mbarrier_init();
  }
};

/// The tiles and barriers of a block.
template <class Traits>
struct PrefillSm90WideShared {
  PrefillSm90WideBarriers<Traits>& barriers;
  std::byte* queries;        // (atoms) of (64 queries x 64)
  std::byte* keys;           // (key_stages, stage_atoms) of (64 keys x 64)
  std::byte* values;         // (value_stages, value_atoms) of (16 values x 64)
  std::byte* probabilities;  // (2) of (64 queries x 64 keys)

  __device__ PrefillSm90WideShared(PrefillSm90WideBarriers<Traits>& barriers, void* dynamic)
      : barriers(barriers),
        queries(at_atom_alignment(dynamic)),
        keys(queries + Traits::atoms * Traits::q_atom),
        values(keys + Traits::key_stages * Traits::stage_bytes),
        probabilities(values + Traits::value_stages * Traits::stage_bytes) {}

  /// A warp has read a stage of keys or values: both blocks write into it.
  __device__ static void release(Mbarrier& empty) {
    if (const int lane = threadIdx.x % 32; lane < Traits::cluster) empty.arrive_at(lane);
  }
};

/// The block's queries, then for every tile of keys its slabs of two atoms, of which this block loads one. One thread.
template <class Traits>
__device__ __forceinline__ void load_wide_keys(const PrefillSm90WideShared<Traits>& shared,
                                               const AttentionTensorMaps& maps, const QueryTile& tile, int kv_head,
                                               int block) {
  auto& queries_full = shared.barriers.queries_full;
  queries_full.arrive_expect_tx(Traits::atoms * Traits::q_atom);
  for (int n = 0; n < Traits::atoms; ++n)
    tma_load(shared.queries + n * Traits::q_atom, maps.q, {n * atom_columns, tile.head, tile.token + 64 * block, 0},
             queries_full);
  PipelineState<Traits::key_stages> at;
  for (int j = 0; j < ceil_div(tile.keys, Traits::keys); ++j)
    for (int slab = 0; slab < Traits::key_slabs; ++slab, at.advance()) {
      auto& full = shared.barriers.keys.full[at.stage];
      shared.barriers.keys.empty[at.stage].wait(at.phase + 1);
      full.arrive_expect_tx(Traits::stage_bytes);
      tma_load_multicast(
          (1 << Traits::cluster) - 1, shared.keys + at.stage * Traits::stage_bytes + block * Traits::key_atom, maps.k,
          {slab * Traits::stage_dims + block * atom_columns, kv_head, tile.first_key + j * Traits::keys, tile.row},
          full);
    }
}

/// For every tile of keys its slabs of 16 values, of whose atoms this block loads half. One thread.
template <class Traits>
__device__ __forceinline__ void load_wide_values(const PrefillSm90WideShared<Traits>& shared,
                                                 const AttentionTensorMaps& maps, const QueryTile& tile, int kv_head,
                                                 int block) {
  PipelineState<Traits::value_stages> at;
  for (int j = 0; j < ceil_div(tile.keys, Traits::keys); ++j)
    for (int slab = 0; slab < Traits::value_slabs; ++slab, at.advance()) {
      auto& full = shared.barriers.values.full[at.stage];
      shared.barriers.values.empty[at.stage].wait(at.phase + 1);
      full.arrive_expect_tx(Traits::stage_bytes);
      const int position = tile.first_key + j * Traits::keys + slab * Traits::stage_values;
      for (int n = block; n < Traits::value_atoms; n += Traits::cluster)
        tma_load_multicast((1 << Traits::cluster) - 1,
                           shared.values + at.stage * Traits::stage_bytes + n * Traits::value_atom, maps.v,
                           {n * atom_columns, kv_head, position, tile.row}, full);
    }
}

/// S = Q K^T of a tile, slab after slab; a slab's stage is released when the products of the next one are queued.
template <class Traits>
__device__ __forceinline__ void multiply_key_slabs(Fragment<1, Traits::keys / 8>& s,
                                                   const PrefillSm90WideShared<Traits>& shared, std::uint64_t q,
                                                   std::uint64_t first_k, PipelineState<Traits::key_stages>& at) {
  constexpr int full_steps = Traits::stage_dims / 16, last_slab = Traits::key_slabs - 1;
  constexpr int last_steps = (Traits::dims - last_slab * Traits::stage_dims) / 16;
  auto& barriers = shared.barriers.keys;
  int before = 0;  // the stage of the slab before
#pragma unroll
  for (int slab = 0; slab < Traits::key_slabs; ++slab, at.advance()) {
    const std::uint64_t q_slab = q + slab * descriptor_step(Traits::stage_atoms * Traits::q_atom);
    const std::uint64_t k = first_k + at.stage * descriptor_step(Traits::stage_bytes);
    barriers.full[at.stage].wait(at.phase);
    wgmma_fence();
    if (slab < last_slab)
      multiply_keys<full_steps, Traits::q_atom, Traits::key_atom>(s, q_slab, k, slab > 0);
    else
      multiply_keys<last_steps, Traits::q_atom, Traits::key_atom>(s, q_slab, k, slab > 0);
    wgmma_commit();
    if (slab > 0) {
      wgmma_wait<1>();
      shared.release(barriers.empty[before]);
    }
    before = at.stage;
  }
  wgmma_wait<0>();
  fence_operand(s.sums);
  shared.release(barriers.empty[before]);
}

/// Writes P (64 x 64) of a warpgroup, rounded, as one atom with 128-byte swizzle: ldmatrix reads it.
__device__ __forceinline__ void store_swizzled(const Fragment<1, 8>& p, std::byte* atom, int row) {
  std::byte* to = atom + row * atom_row_bytes + threadIdx.x % 4 * 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    std::byte* piece = to + (n ^ (row % 8)) * 16;
    *reinterpret_cast<unsigned*>(piece) = pack_bf16(p.at(0, 2 * n), p.at(0, 2 * n + 1));
    *reinterpret_cast<unsigned*>(piece + 8 * atom_row_bytes) = pack_bf16(p.at(1, 2 * n), p.at(1, 2 * n + 1));
  }
}

/// The warpgroup of scores: P and rescale of every tile of keys, at last 1 / sum in place of rescale; and lse.
template <class Traits>
__device__ __forceinline__ void score_wide_tiles(const PrefillSm90WideShared<Traits>& shared, const QueryTile& tile,
                                                 int block, float scale, Matrix<float> lse) {
  constexpr int keys = Traits::keys;
  const int first = 64 * block, warp_row = threadIdx.x / 32 % 4 * 16, lane = threadIdx.x % 32;
  const int row = warp_row + lane / 4;  // this lane's first
  auto& barriers = shared.barriers;
  const std::uint64_t q = shared_descriptor(shared.queries), first_k = shared_descriptor(shared.keys);
  PipelineState<Traits::key_stages> k_at;
  PipelineState<2> p_at;
  Fragment<1, keys / 8> s;  // (64 x 64): S, then P
  OnlineSoftmax<2> softmax;
  const auto store_rescale = [&](const RowValues<2>& rescale) {
    if (lane % 4 != 0) return;
    barriers.rescale[p_at.stage][row] = rescale[0];
    barriers.rescale[p_at.stage][row + 8] = rescale[1];
  };
  barriers.queries_full.wait(0);
  for (int j = 0; j < ceil_div(tile.keys, keys); ++j) {
    multiply_key_slabs(s, shared, q, first_k, k_at);
    if ((j + 1) * keys - 1 > tile.position + first) s.mask_after(tile.position + first + warp_row - j * keys);
    const auto rescale = softmax.update(s, scale * log2_e);
    barriers.probabilities.empty[p_at.stage].wait(p_at.phase + 1);
    store_rescale(rescale);
    store_swizzled(s, shared.probabilities + p_at.stage * Traits::probability_bytes, row);
    barriers.probabilities.full[p_at.stage].arrive();
    p_at.advance();
  }
  const auto total = softmax.total();
  tile.store_lse(softmax, total, first + warp_row, scale, lse);
  barriers.probabilities.empty[p_at.stage].wait(p_at.phase + 1);
  store_rescale(total.reciprocal());
  barriers.probabilities.full[p_at.stage].arrive();
}

/// O += P V of a tile, 16 keys after the other. values: this warpgroup's first atom of stage 0; p (64 x 64).
template <class Traits, int DimTiles>
__device__ __forceinline__ void add_value_slabs(Fragment<1, DimTiles>& o, OperandFragment<1, Traits::keys / 16>& p,
                                                const PrefillSm90WideShared<Traits>& shared, std::byte* values,
                                                std::uint64_t first_v, int left,
                                                PipelineState<Traits::value_stages>& at) {
  constexpr int atoms = ceil_div(8 * DimTiles, atom_columns);
  auto& barriers = shared.barriers.values;
  int before = 0;  // the stage of the slab before
  fence_operand(o.sums);
  fence_operand(p.tile[0]);
#pragma unroll
  for (int slab = 0; slab < Traits::value_slabs; ++slab, at.advance()) {
    barriers.full[at.stage].wait(at.phase);
    const int valid = left - slab * Traits::stage_values;
    if (valid < Traits::stage_values)
      clear_rows<atoms>(values + at.stage * Traits::stage_bytes, Traits::value_atom, valid, Traits::stage_values);
    wgmma_fence();
    add_values<Traits::value_atom>(o, p.tile[0][slab], first_v + at.stage * descriptor_step(Traits::stage_bytes));
    wgmma_commit();
    if (slab > 0) {
      wgmma_wait<1>();
      shared.release(barriers.empty[before]);
    }
    before = at.stage;
  }
  wgmma_wait<0>();
  fence_operand(o.sums);
  shared.release(barriers.empty[before]);
}

/// A warpgroup of sums: O = O * rescale + P V of 8 DimTiles dimensions from `column` on, for every tile of keys.
template <int DimTiles, class Traits>
__device__ __forceinline__ void sum_wide_tiles(const PrefillSm90WideShared<Traits>& shared, const QueryTile& tile,
                                               int block, int column, int head_dim, Matrix<bf16> out) {
  constexpr int keys = Traits::keys;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
  const int row = warp_row + lane / 4;     // this lane's first of O
  const int p_row = warp_row + lane % 16;  // of P that this lane names
  auto& barriers = shared.barriers;
  std::byte* values = shared.values + column / atom_columns * Traits::value_atom;
  const std::uint64_t first_v = shared_descriptor(values, Traits::value_atom);
  PipelineState<Traits::value_stages> v_at;
  PipelineState<2> p_at;
  Fragment<1, DimTiles> o = {};  // (64 x 8 DimTiles)
  const auto load_rescale = [&] {
    return RowValues<2>{barriers.rescale[p_at.stage][row], barriers.rescale[p_at.stage][row + 8]};
  };
  for (int j = 0; j < ceil_div(tile.keys, keys); ++j) {
    OperandFragment<1, keys / 16> p;  // (64 x 64)
    barriers.probabilities.full[p_at.stage].wait(p_at.phase);
    const auto rescale = load_rescale();
    const std::byte* of_row = shared.probabilities + p_at.stage * Traits::probability_bytes + p_row * atom_row_bytes;
#pragma unroll
    for (int k = 0; k < keys / 16; ++k) ldmatrix(p.tile[0][k], of_row + ((2 * k + lane / 16) ^ (p_row % 8)) * 16);
    barriers.probabilities.empty[p_at.stage].arrive();
    p_at.advance();
    o.scale_rows(rescale);
    add_value_slabs(o, p, shared, values, first_v, tile.keys - j * keys, v_at);
  }
  barriers.probabilities.full[p_at.stage].wait(p_at.phase);
  tile.store(o, load_rescale(), 64 * block + warp_row, column, head_dim, out);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_prefill_sm90_wide_kernel(const __grid_constant__ AttentionTensorMaps maps, AttentionShape shape,
                                       Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                                       AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  if constexpr (has_wgmma) {
    __shared__ PrefillSm90WideBarriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const auto tile = QueryTile::of_block<Traits::queries, Traits::cluster>(shape, q, source, sequences, rows);
    if (tile.tokens == 0) return;
    const PrefillSm90WideShared<Traits> shared(barriers, dynamic);
    if (threadIdx.x == 0) barriers.init();
    cluster_sync();

    const int block = static_cast<int>(cluster_rank()), head_dim = static_cast<int>(shape.head_dim);
    const int group = threadIdx.x / warpgroup_threads, warp = threadIdx.x / 32 % 4;
    if (group == 3) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int kv_head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
      const bool one_thread = threadIdx.x % 32 == 0;
      if (one_thread && warp == 0)
        load_wide_keys(shared, maps, tile, kv_head, block);
      else if (one_thread && warp == 1)
        load_wide_values(shared, maps, tile, kv_head, block);
    } else if (group == 0) {
      setmaxnreg_dec<Traits::score_registers>();
      score_wide_tiles(shared, tile, block, static_cast<float>(shape.scale), lse);
    } else {
      setmaxnreg_inc<Traits::sum_registers>();
      if (group == 1)
        sum_wide_tiles<Traits::first_dims / 8>(shared, tile, block, 0, head_dim, out);
      else
        sum_wide_tiles<Traits::other_dims / 8>(shared, tile, block, Traits::first_dims, head_dim, out);
    }
    cluster_sync();  // a block stays while the other may write into it
  }
}

}  // namespace zamba::kernel
