// SPDX-License-Identifier: MIT
// attention by warpgroups of heads of at most 256 dimensions: see attention_warpgroups.cuh.
#pragma once

#include <cstdint>

#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Heads of at most Dims_ dimensions, keys and values in tiles of Keys_.
template <int Dims_, int Keys_>
struct WholeHeadTraits {
  static constexpr int dims = Dims_, keys = Keys_;
  static constexpr int stages = 2, groups = 2;  // of a ring; of warpgroups that compute
  static constexpr int queries = 64 * groups, box_queries = queries, cluster = 1;
  static constexpr int threads = warpgroup_threads * (groups + 1);
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int q_atom = queries * atom_row_bytes, key_atom = keys * atom_row_bytes;
  static constexpr int stage_bytes = atoms * key_atom;
  static constexpr std::size_t shared_bytes = atom_alignment + atoms * q_atom + 2 * stages * stage_bytes;
  static constexpr int box_keys = keys, box_values = keys;
  static constexpr int computing_registers = 240, copying_registers = 24;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    whole_head_attention_kernel(const __grid_constant__ AttentionBoxes boxes, AttentionShape shape,
                                Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                                AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  if constexpr (has_wgmma) {
    constexpr int keys = Traits::keys, stages = Traits::stages, groups = Traits::groups;
    __shared__ Mbarrier queries_full;
    __shared__ StageBarriers<stages> of_keys, of_values;
    extern __shared__ uint4 tiles[];
    const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
    if (tile.tokens == 0) return;
    std::byte* queries = at_atom_alignment(tiles);
    std::byte* key_stages = queries + Traits::atoms * Traits::q_atom;
    std::byte* value_stages = key_stages + stages * Traits::stage_bytes;
    const int count = ceil_div(tile.keys, keys);  // of tiles of keys
    const int group = threadIdx.x / warpgroup_threads;
    if (threadIdx.x == 0) {
      queries_full.init(1);
      of_keys.init(4 * groups);
      of_values.init(4 * groups);
      fence_mbarrier_init();
    }
    __syncthreads();

    if (group == groups) {
      shrink_registers<Traits::copying_registers>();
      const int warp = threadIdx.x / 32 % 4;
      if (threadIdx.x % 32 == 0 && warp < 2) {
        const bool values = warp == 1;
        if (!values) {
          queries_full.arrive_expect_tx(Traits::atoms * Traits::q_atom);
          for (int n = 0; n < Traits::atoms; ++n)
            tma_load(queries + n * Traits::q_atom, boxes.q, {n * atom_columns, tile.head, tile.token, 0}, queries_full);
        }
        auto& barriers = values ? of_values : of_keys;
        const CUtensorMap& from = values ? boxes.v : boxes.k;
        const int head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
        StageWalk<stages> walk;
        for (int j = 0; j < count; ++j, walk.next()) {
          barriers.empty[walk.stage].wait(walk.phase + 1);
          barriers.full[walk.stage].arrive_expect_tx(Traits::stage_bytes);
          std::byte* to = (values ? value_stages : key_stages) + walk.stage * Traits::stage_bytes;
          for (int n = 0; n < Traits::atoms; ++n)
            tma_load(to + n * Traits::key_atom, from, {n * atom_columns, head, tile.first_key + j * keys, tile.row},
                     barriers.full[walk.stage]);
        }
      }
    } else {
      grow_registers<Traits::computing_registers>();
      const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;  // this lane's first
      const int position = tile.position + 64 * group;                            // of the warpgroup's first query
      constexpr int two_groups = 2 * warpgroup_threads;
      const int own_turn = groups + 1 + group, next_turn = groups + 1 + (group + 1) % groups;  // barriers
      const float scale = static_cast<float>(shape.scale) * log2_e;
      const std::uint64_t of_queries = shared_descriptor(queries + 64 * group * atom_row_bytes);
      const std::uint64_t first_keys = shared_descriptor(key_stages),
                          first_values = shared_descriptor(value_stages, Traits::key_atom);
      StageWalk<stages> key_walk, value_walk;
      float sums[Traits::dims / 2] = {}, scores[keys / 2], shrink[2];
      unsigned p[keys / 16][4];
      RowSoftmax softmax;

      const auto begin_scores = [&] {
        of_keys.full[key_walk.stage].wait(key_walk.phase);
        wgmma_fence();
        multiply_keys<keys, Traits::dims / 16, Traits::q_atom, Traits::key_atom>(
            scores, of_queries, first_keys + key_walk.stage * descriptor_step(Traits::stage_bytes), false);
        wgmma_commit();
      };
      const auto begin_sums = [&](int valid) {
        of_values.full[value_walk.stage].wait(value_walk.phase);
        if (valid < keys)
          clear_rows<Traits::atoms>(value_stages + value_walk.stage * Traits::stage_bytes, Traits::key_atom, valid,
                                    keys);
        const std::uint64_t of_stage = first_values + value_walk.stage * descriptor_step(Traits::stage_bytes);
        fence_operand(sums);
        fence_operand(p);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < keys / 16; ++k)
          add_values<Traits::dims, Traits::key_atom>(sums, p[k], of_stage + descriptor_step(k * 16 * atom_row_bytes));
        wgmma_commit();
      };
      const auto end_scores = [&](int j) {
        fence_operand(scores);
        if (lane == 0) of_keys.empty[key_walk.stage].arrive();
        key_walk.next();
        if ((j + 1) * keys - 1 > position) mask_scores(scores, tile.position + row, j * keys);
        softmax.add(scores, scale, shrink);
      };
      const auto end_sums = [&] {
        wgmma_wait<0>();
        fence_operand(sums);
        if (lane == 0) of_values.empty[value_walk.stage].arrive();
        value_walk.next();
      };
      const auto round_probabilities = [&] {
#pragma unroll
        for (int k = 0; k < keys / 16; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) p[k][i] = pack_bf16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
      };

      // The warpgroups take turns at the tensor cores: one exponentiates while the others multiply.
      const auto await_turn = [&] { named_barrier_sync(own_turn, two_groups); };
      const auto end_turn = [&](int j) {
        if (group + 1 < groups || j + 1 < count) named_barrier_arrive(next_turn, two_groups);
      };
      if (group + 1 == groups) named_barrier_arrive(next_turn, two_groups);
      queries_full.wait(0);
      await_turn();
      begin_scores();
      end_turn(0);
      wgmma_wait<0>();
      end_scores(0);
      round_probabilities();
      for (int j = 1; j < count; ++j) {
        await_turn();
        begin_scores();
        begin_sums(keys);
        end_turn(j);
        wgmma_wait<1>();
        end_scores(j);
        end_sums();
        scale_sums(sums, shrink);
        round_probabilities();
      }
      begin_sums(tile.keys - (count - 1) * keys);
      end_sums();

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float all = row_sum(softmax.total[half]);
        const int r = row + 8 * half;
        if (lane % 4 == 0 && r < tile.tokens)
          lse(tile.token + r, tile.head) = softmax.greatest[half] * static_cast<float>(shape.scale) + ::log(all);
        shrink[half] = 1 / all;
      }
      write_rows(tile, sums, shrink, row, 0, static_cast<int>(shape.head_dim), out);
    }
  }
}

}  // namespace zamba::kernel
