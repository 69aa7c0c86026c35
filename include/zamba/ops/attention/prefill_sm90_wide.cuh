// SPDX-License-Identifier: MIT
// attention by warpgroups of heads of 257 to 512 dimensions: see attention_warpgroups.cuh.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Heads of more than 256 and at most Dims_ dimensions.
template <int Dims_>
struct SplitHeadTraits {
  static constexpr int dims = Dims_, first_dims = 256, other_dims = dims - first_dims;
  static constexpr int cluster = 2, queries = 64 * cluster, box_queries = 64, keys = 64;
  static constexpr int threads = warpgroup_threads * 4;  // scores, two of sums, copies
  static constexpr int atoms = ceil_div(dims, atom_columns);
  static constexpr int q_atom = box_queries * atom_row_bytes;
  // A stage of keys is two atoms of 64 keys; one of values is all atoms of 16 values, eight always, so each block of
  // the cluster copies half of them.
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
  static constexpr int score_registers = 112, sum_registers = 184, copying_registers = 24;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    split_head_attention_kernel(const __grid_constant__ AttentionBoxes boxes, AttentionShape shape,
                                Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                                AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  if constexpr (has_wgmma) {
    constexpr int keys = Traits::keys;
    __shared__ Mbarrier queries_full, probabilities_full[2], probabilities_empty[2];
    __shared__ StageBarriers<Traits::key_stages> of_keys;
    __shared__ StageBarriers<Traits::value_stages> of_values;
    __shared__ float factors[2][64];  // of what was summed, by row
    extern __shared__ uint4 tiles[];
    const auto tile = QueryTile::of_block<Traits::queries, Traits::cluster>(shape, q, source, sequences, rows);
    if (tile.tokens == 0) return;
    std::byte* queries = at_atom_alignment(tiles);
    std::byte* key_stages = queries + Traits::atoms * Traits::q_atom;
    std::byte* value_stages = key_stages + Traits::key_stages * Traits::stage_bytes;
    std::byte* probabilities = value_stages + Traits::value_stages * Traits::stage_bytes;
    const int count = ceil_div(tile.keys, keys);  // of tiles of keys
    const int group = threadIdx.x / warpgroup_threads, lane = threadIdx.x % 32;
    const int block = static_cast<int>(cluster_rank());
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;  // this lane's first, among the block's queries
    if (threadIdx.x == 0) {
      queries_full.init(1);
      of_keys.init(4 * Traits::cluster);
      of_values.init(8 * Traits::cluster);
      for (int s = 0; s < 2; ++s) {
        probabilities_full[s].init(warpgroup_threads);
        probabilities_empty[s].init(2 * warpgroup_threads);
      }
      fence_mbarrier_init();
    }
    cluster_sync();
    // A stage was read: both blocks write into it.
    const auto let_go = [&](Mbarrier& empty) {
      if (lane < Traits::cluster) empty.arrive_at(lane);
    };

    if (group == 3) {
      shrink_registers<Traits::copying_registers>();
      constexpr std::uint16_t both = 3;
      const int head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
      const int warp = threadIdx.x / 32 % 4;
      if (lane == 0 && warp == 0) {
        queries_full.arrive_expect_tx(Traits::atoms * Traits::q_atom);
        for (int n = 0; n < Traits::atoms; ++n)
          tma_load(queries + n * Traits::q_atom, boxes.q, {n * atom_columns, tile.head, tile.token + 64 * block, 0},
                   queries_full);
        StageWalk<Traits::key_stages> walk;
        for (int j = 0; j < count; ++j)
          for (int slab = 0; slab < Traits::key_slabs; ++slab, walk.next()) {
            auto& full = of_keys.full[walk.stage];
            of_keys.empty[walk.stage].wait(walk.phase + 1);
            full.arrive_expect_tx(Traits::stage_bytes);
            tma_load_multicast(
                both, key_stages + walk.stage * Traits::stage_bytes + block * Traits::key_atom, boxes.k,
                {slab * Traits::stage_dims + block * atom_columns, head, tile.first_key + j * keys, tile.row}, full);
          }
      } else if (lane == 0 && warp == 1) {
        StageWalk<Traits::value_stages> walk;
        for (int j = 0; j < count; ++j)
          for (int slab = 0; slab < Traits::value_slabs; ++slab, walk.next()) {
            auto& full = of_values.full[walk.stage];
            of_values.empty[walk.stage].wait(walk.phase + 1);
            full.arrive_expect_tx(Traits::stage_bytes);
            for (int n = block; n < Traits::value_atoms; n += Traits::cluster)
              tma_load_multicast(
                  both, value_stages + walk.stage * Traits::stage_bytes + n * Traits::value_atom, boxes.v,
                  {n * atom_columns, head, tile.first_key + j * keys + slab * Traits::stage_values, tile.row}, full);
          }
      }
    } else if (group == 0) {
      shrink_registers<Traits::score_registers>();
      const int position = tile.position + 64 * block;  // of the block's first query
      const float scale = static_cast<float>(shape.scale) * log2_e;
      const std::uint64_t of_queries = shared_descriptor(queries), first_keys = shared_descriptor(key_stages);
      StageWalk<Traits::key_stages> walk;
      StageWalk<2> to;
      float scores[keys / 2], shrink[2];
      RowSoftmax softmax;
      const auto write_factors = [&](const float(&factor)[2]) {
        if (lane % 4 != 0) return;
        factors[to.stage][row] = factor[0];
        factors[to.stage][row + 8] = factor[1];
      };
      queries_full.wait(0);
      for (int j = 0; j < count; ++j) {
        Mbarrier* last = nullptr;
        const auto begin_slab = [&]<int Slab>(std::integral_constant<int, Slab>) {
          constexpr int first = Slab * Traits::stage_dims;
          constexpr int left = Traits::dims - first,
                        steps = (left < Traits::stage_dims ? left : Traits::stage_dims) / 16;
          of_keys.full[walk.stage].wait(walk.phase);
          wgmma_fence();
          multiply_keys<keys, steps, Traits::q_atom, Traits::key_atom>(
              scores, of_queries + descriptor_step(Slab * Traits::stage_atoms * Traits::q_atom),
              first_keys + walk.stage * descriptor_step(Traits::stage_bytes), Slab > 0);
          wgmma_commit();
          if constexpr (Slab > 0) {
            wgmma_wait<1>();
            let_go(*last);
          }
          last = &of_keys.empty[walk.stage];
          walk.next();
        };
        [&]<int... Slab>(std::integer_sequence<int, Slab...>) {
          (begin_slab(std::integral_constant<int, Slab>{}), ...);
        }
        (std::make_integer_sequence<int, Traits::key_slabs>{});
        wgmma_wait<0>();
        fence_operand(scores);
        let_go(*last);
        if ((j + 1) * keys - 1 > position) mask_scores(scores, position + row, j * keys);
        softmax.add(scores, scale, shrink);
        probabilities_empty[to.stage].wait(to.phase + 1);
        write_factors(shrink);
        std::byte* p = probabilities + to.stage * Traits::probability_bytes + row * atom_row_bytes + lane % 4 * 4;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) {
          std::byte* piece = p + ((n ^ (row % 8)) * 16);
          *reinterpret_cast<unsigned*>(piece) = pack_bf16(scores[4 * n], scores[4 * n + 1]);
          *reinterpret_cast<unsigned*>(piece + 8 * atom_row_bytes) = pack_bf16(scores[4 * n + 2], scores[4 * n + 3]);
        }
        probabilities_full[to.stage].arrive();
        to.next();
      }
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float all = row_sum(softmax.total[half]);
        const int r = 64 * block + row + 8 * half;
        if (lane % 4 == 0 && r < tile.tokens)
          lse(tile.token + r, tile.head) = softmax.greatest[half] * static_cast<float>(shape.scale) + ::log(all);
        factor[half] = 1 / all;
      }
      probabilities_empty[to.stage].wait(to.phase + 1);
      write_factors(factor);
      probabilities_full[to.stage].arrive();
    } else {
      grow_registers<Traits::sum_registers>();
      const auto sum = [&]<int Columns>(std::integral_constant<int, Columns>, int column) {
        constexpr int atoms = ceil_div(Columns, atom_columns);
        std::byte* values = value_stages + column / atom_columns * Traits::value_atom;
        const std::uint64_t first_values = shared_descriptor(values, Traits::value_atom);
        float sums[Columns / 2] = {};
        StageWalk<Traits::value_stages> walk;
        StageWalk<2> from;
        const int a_row = threadIdx.x / 32 % 4 * 16 + lane % 16;  // that this lane names
        const auto read_factors = [&](float(&factor)[2]) {
          factor[0] = factors[from.stage][row];
          factor[1] = factors[from.stage][row + 8];
        };
        float factor[2];
        for (int j = 0; j < count; ++j) {
          unsigned p[keys / 16][4];
          probabilities_full[from.stage].wait(from.phase);
          read_factors(factor);
          const std::byte* of_row = probabilities + from.stage * Traits::probability_bytes + a_row * atom_row_bytes;
#pragma unroll
          for (int k = 0; k < keys / 16; ++k) ldmatrix(p[k], of_row + ((2 * k + lane / 16) ^ (a_row % 8)) * 16);
          probabilities_empty[from.stage].arrive();
          from.next();
          scale_sums(sums, factor);
          Mbarrier* last = nullptr;
          fence_operand(sums);
          fence_operand(p);
#pragma unroll
          for (int k = 0; k < Traits::value_slabs; ++k) {
            of_values.full[walk.stage].wait(walk.phase);
            const int valid = tile.keys - j * keys - k * Traits::stage_values;
            if (valid < Traits::stage_values)
              clear_rows<atoms>(values + walk.stage * Traits::stage_bytes, Traits::value_atom, valid,
                                Traits::stage_values);
            wgmma_fence();
            add_values<Columns, Traits::value_atom>(sums, p[k],
                                                    first_values + walk.stage * descriptor_step(Traits::stage_bytes));
            wgmma_commit();
            if (k > 0) {
              wgmma_wait<1>();
              let_go(*last);
            }
            last = &of_values.empty[walk.stage];
            walk.next();
          }
          wgmma_wait<0>();
          fence_operand(sums);
          let_go(*last);
        }
        probabilities_full[from.stage].wait(from.phase);
        read_factors(factor);
        write_rows(tile, sums, factor, 64 * block + row, column, static_cast<int>(shape.head_dim), out);
      };
      if (group == 1)
        sum(std::integral_constant<int, Traits::first_dims>{}, 0);
      else
        sum(std::integral_constant<int, Traits::other_dims>{}, Traits::first_dims);
    }
    cluster_sync();  // a block stays while the other may write into it
  }
}

}  // namespace zamba::kernel
