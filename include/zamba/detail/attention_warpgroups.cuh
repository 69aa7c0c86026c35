// SPDX-License-Identifier: MIT
// attention of bf16 by warpgroups, for rows of several tokens; equations and shapes in ops/attention.hpp. What
// attention_tiles.cuh does for every GPU with tensor cores, this does faster where sm_90a is compiled for and runs.
//
// Some threads only copy: boxes of keys and of values go through two rings of stages in shared memory, and a barrier
// for each stage says that it is full, another that it was read. The other warpgroups compute. Two kernels:
//   whole heads   of at most 256 dimensions. A warpgroup holds 64 queries with all their dimensions in registers; the
//                 scores of a tile are computed while the tensor cores multiply the probabilities of the one before it.
//   split heads   of more. 64 queries a block: one warpgroup computes scores and probabilities, which pass through
//                 shared memory, two hold the sums, 256 dimensions the first and the rest the second. Two blocks of
//                 neighbouring queries are a cluster: each copies half of every stage, to both.
// A box that leaves the tensor is filled with zeros; what it holds of other rows of the batch, or of a cache beyond the
// last key, does not count: such scores are masked and such values set to zero.
//
// Numeric contract: that of attention_tiles.cuh.
#pragma once

#include <cstdint>

#include <zamba/context.cuh>
#include <zamba/detail/attention_tiles.cuh>
#include <zamba/detail/launch.cuh>
#include <zamba/detail/tensor_core.cuh>
#include <zamba/detail/warpgroup.cuh>
#include <zamba/ops/attention.hpp>

namespace zamba::detail {

/// Queries (boxes of 64), keys and values as boxes.
struct AttentionBoxes {
  CUtensorMap q, k, v;
};

/// Barriers of a ring of stages.
template <int Stages>
struct StageBarriers {
  SharedBarrier full[Stages], empty[Stages];

  __device__ void init(unsigned readers) {
    for (int s = 0; s < Stages; ++s) {
      full[s].init(1);
      empty[s].init(readers);
    }
  }
};

/// A walk through a ring of stages.
template <int Stages>
struct StageWalk {
  int stage = 0;
  unsigned phase = 0;

  __device__ void next() {
    if (++stage < Stages) return;
    stage = 0;
    ++phase;
  }
};

/// The running softmax of two rows of a warpgroup's sums, r = g and g + 8, in the four lanes that share them.
struct RowSoftmax {
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {};  // total: of this lane

  /// Scores (Count a lane) become exponentials; shrink: the factor of what was summed before.
  template <int Count>
  __device__ __forceinline__ void add(float (&scores)[Count], float scale, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = greatest[half];
#pragma unroll
      for (int i = 2 * half; i < Count; i += 4) most = ::max(most, ::max(scores[i], scores[i + 1]));
      most = greatest_of_row(most);
      shrink[half] = exp2_approximate((greatest[half] - most) * scale);
      greatest[half] = most;
      const float origin = -most * scale;
      float of_tile = 0;
#pragma unroll
      for (int i = 2 * half; i < Count; i += 4) {
        scores[i] = exp2_approximate(::fmaf(scores[i], scale, origin));
        scores[i + 1] = exp2_approximate(::fmaf(scores[i + 1], scale, origin));
        of_tile += scores[i] + scores[i + 1];
      }
      total[half] = total[half] * shrink[half] + of_tile;
    }
  }
};

/// Scores of keys after the query become -infinity. `query` is the position of row g, `key` that of the first column.
template <int Count>
__device__ __forceinline__ void mask_scores(float (&scores)[Count], int query, int key) {
  const int reach = query - key - threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < Count; ++i)
    if (i / 4 * 8 + i % 2 > reach + i / 2 % 2 * 8) scores[i] = -INFINITY;
}

/// sums *= factor, row by row; most often there is nothing to do.
template <int Count>
__device__ __forceinline__ void scale_sums(float (&sums)[Count], const float (&factor)[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
  for (int i = 0; i < Count; ++i) sums[i] *= factor[i / 2 % 2];
}

/// scores = a b^T over Steps times 16 columns that begin in the atoms at a and b; `add`: to what is there.
template <int Keys, int Steps>
__device__ __forceinline__ void multiply_keys(float (&scores)[Keys / 2], const std::byte* a, int a_atom,
                                              const std::byte* b, int b_atom, bool add) {
#pragma unroll
  for (int k = 0; k < Steps; ++k)
    WarpgroupProduct<Keys>::of_shared(scores, operand_at(a + k / 4 * a_atom + k % 4 * 32),
                                      operand_at(b + k / 4 * b_atom + k % 4 * 32), add || k > 0);
}

/// sums (64 x Columns) += p times 16 rows of values that begin in the atoms at v.
template <int Columns>
__device__ __forceinline__ void add_values(float (&sums)[Columns / 2], const unsigned (&p)[4], const std::byte* v,
                                           int v_atom) {
  constexpr int whole = Columns / atom_columns, rest = Columns % atom_columns;
#pragma unroll
  for (int n = 0; n < whole; ++n) WarpgroupProduct<64>::add(sums + 32 * n, p, operand_at(v + n * v_atom));
  if constexpr (rest > 0) WarpgroupProduct<rest>::add(sums + 32 * whole, p, operand_at(v + whole * v_atom));
}

/// Rows from `first` on of a warpgroup's atoms become zero, before products read them.
template <int Atoms>
__device__ void clear_rows(std::byte* atoms, int atom_bytes, int first, int rows) {
  first = ::max(first, 0);
  for (int i = first * 8 + threadIdx.x % warpgroup_threads; i < rows * 8; i += warpgroup_threads)
    for (int n = 0; n < Atoms; ++n) *reinterpret_cast<uint4*>(atoms + n * atom_bytes + i * 16) = uint4{};
  stores_before_products();
  warpgroup_barrier(threadIdx.x / warpgroup_threads);
}

/// Writes two rows of sums, times factor: row `row` of the tile and the one 8 on, from `column` on.
template <int Count>
__device__ void write_rows(const QueryTile& tile, const float (&sums)[Count], const float (&factor)[2], int row,
                           int column, int head_dim, Matrix<bf16> out) {
  column += threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    if (r >= tile.tokens) continue;
    bf16* to = &out(tile.token + r, tile.head * head_dim);
#pragma unroll
    for (int n = 0; n < Count / 4; ++n)
      if (const int c = column + 8 * n; c < head_dim)
        *reinterpret_cast<unsigned*>(to + c) =
            pack_bf16(sums[4 * n + 2 * half] * factor[half], sums[4 * n + 2 * half + 1] * factor[half]);
  }
}

__device__ inline std::byte* at_atom_alignment(void* shared) {
  const unsigned past = shared_address(shared) % atom_alignment;
  return static_cast<std::byte*>(shared) + (past ? atom_alignment - past : 0);
}

/// Heads of at most Dims_ dimensions, keys and values in tiles of Keys_ and rings of Stages_, Groups_ warpgroups of 64
/// queries.
template <int Dims_, int Keys_, int Stages_, int Groups_>
struct WholeHeadTraits {
  static constexpr int dims = Dims_, keys = Keys_, stages = Stages_, groups = Groups_;
  static constexpr int queries = 64 * groups, box_queries = queries, cluster = 1;
  static constexpr int threads = warpgroup_threads * (groups + 1);
  static constexpr int atoms = (dims + atom_columns - 1) / atom_columns;
  static constexpr int q_atom = queries * atom_row_bytes, key_atom = keys * atom_row_bytes;
  static constexpr int stage_bytes = atoms * key_atom;
  static constexpr std::size_t shared_bytes = atom_alignment + atoms * q_atom + 2 * stages * stage_bytes;
  static constexpr int box_keys = keys, box_values = keys;
  static constexpr int own_registers = groups == 2 ? 240 : 160, copying_registers = groups == 2 ? 24 : 32;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    whole_head_attention_kernel(const __grid_constant__ AttentionBoxes boxes, AttentionShape shape,
                                Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                                AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  if constexpr (with_warpgroups) {
    constexpr int keys = Traits::keys, stages = Traits::stages, groups = Traits::groups;
    __shared__ SharedBarrier queries_full;
    __shared__ StageBarriers<stages> of_keys, of_values;
    extern __shared__ uint4 tiles[];
    const auto tile = QueryTile::of_block<Traits::queries>(shape, q, source, sequences, rows);
    if (tile.tokens == 0) return;
    std::byte* queries = at_atom_alignment(tiles);
    std::byte* key_stages = queries + Traits::atoms * Traits::q_atom;
    std::byte* value_stages = key_stages + stages * Traits::stage_bytes;
    const int count = (tile.keys + keys - 1) / keys;  // of tiles of keys
    const int group = threadIdx.x / warpgroup_threads;
    if (threadIdx.x == 0) {
      queries_full.init(1);
      of_keys.init(4 * groups);
      of_values.init(4 * groups);
      barriers_initialised();
    }
    __syncthreads();

    if (group == groups) {
      shrink_registers<Traits::copying_registers>();
      const int warp = threadIdx.x / 32 % 4;
      if (threadIdx.x % 32 == 0 && warp < 2) {
        const bool values = warp == 1;
        if (!values) {
          queries_full.arrive_expecting(Traits::atoms * Traits::q_atom);
          for (int n = 0; n < Traits::atoms; ++n)
            copy_box(queries + n * Traits::q_atom, boxes.q, {n * atom_columns, tile.head, tile.token, 0}, queries_full);
        }
        auto& barriers = values ? of_values : of_keys;
        const CUtensorMap& from = values ? boxes.v : boxes.k;
        const int head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
        StageWalk<stages> walk;
        for (int j = 0; j < count; ++j, walk.next()) {
          barriers.empty[walk.stage].wait(walk.phase + 1);
          barriers.full[walk.stage].arrive_expecting(Traits::stage_bytes);
          std::byte* to = (values ? value_stages : key_stages) + walk.stage * Traits::stage_bytes;
          for (int n = 0; n < Traits::atoms; ++n)
            copy_box(to + n * Traits::key_atom, from, {n * atom_columns, head, tile.first_key + j * keys, tile.row},
                     barriers.full[walk.stage]);
        }
      }
    } else {
      grow_registers<Traits::own_registers>();
      const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;  // this lane's first
      const int position = tile.position + 64 * group;                            // of the warpgroup's first query
      const float scale = static_cast<float>(shape.scale) * log2_e;
      // Tiles after the last query of the warpgroup are only let go.
      const int own = 64 * group < tile.tokens ? (::min(tile.keys, position + 64) + keys - 1) / keys : 0;
      const std::byte* own_queries = queries + 64 * group * atom_row_bytes;
      StageWalk<stages> key_walk, value_walk;
      float sums[Traits::dims / 2] = {}, scores[keys / 2], shrink[2];
      unsigned p[keys / 16][4];
      RowSoftmax softmax;

      const auto begin_scores = [&] {
        of_keys.full[key_walk.stage].wait(key_walk.phase);
        products_begin();
        multiply_keys<keys, Traits::dims / 16>(scores, own_queries, Traits::q_atom,
                                               key_stages + key_walk.stage * Traits::stage_bytes, Traits::key_atom,
                                               false);
        products_commit();
      };
      const auto begin_sums = [&](int valid) {
        of_values.full[value_walk.stage].wait(value_walk.phase);
        std::byte* v = value_stages + value_walk.stage * Traits::stage_bytes;
        if (valid < keys) clear_rows<Traits::atoms>(v, Traits::key_atom, valid, keys);
        keep_in_place(sums);
        keep_in_place(p);
        products_begin();
#pragma unroll
        for (int k = 0; k < keys / 16; ++k)
          add_values<Traits::dims>(sums, p[k], v + k * 16 * atom_row_bytes, Traits::key_atom);
        products_commit();
      };
      const auto end_scores = [&](int j) {
        keep_in_place(scores);
        if (lane == 0) of_keys.empty[key_walk.stage].arrive();
        key_walk.next();
        if ((j + 1) * keys - 1 > position) mask_scores(scores, tile.position + row, j * keys);
        softmax.add(scores, scale, shrink);
      };
      const auto end_sums = [&] {
        products_wait<0>();
        keep_in_place(sums);
        if (lane == 0) of_values.empty[value_walk.stage].arrive();
        value_walk.next();
      };
      const auto round_probabilities = [&] {
#pragma unroll
        for (int k = 0; k < keys / 16; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) p[k][i] = pack_bf16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
      };

      if (own > 0) {
        queries_full.wait(0);
        begin_scores();
        products_wait<0>();
        end_scores(0);
        round_probabilities();
        for (int j = 1; j < own; ++j) {
          begin_scores();
          begin_sums(keys);
          products_wait<1>();
          end_scores(j);
          end_sums();
          scale_sums(sums, shrink);
          round_probabilities();
        }
        begin_sums(tile.keys - (own - 1) * keys);
        end_sums();
      }
      for (int j = own; j < count; ++j) {
        of_keys.full[key_walk.stage].wait(key_walk.phase);
        of_values.full[value_walk.stage].wait(value_walk.phase);
        if (lane == 0) of_keys.empty[key_walk.stage].arrive();
        if (lane == 0) of_values.empty[value_walk.stage].arrive();
        key_walk.next();
        value_walk.next();
      }

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float all = sum_of_row(softmax.total[half]);
        const int r = row + 8 * half;
        if (lane % 4 == 0 && r < tile.tokens)
          lse(tile.token + r, tile.head) = softmax.greatest[half] * static_cast<float>(shape.scale) + ::log(all);
        shrink[half] = 1 / all;
      }
      write_rows(tile, sums, shrink, row, 0, static_cast<int>(shape.head_dim), out);
    }
  }
}

/// Heads of more than 256 and at most Dims_ dimensions.
template <int Dims_>
struct SplitHeadTraits {
  static constexpr int dims = Dims_, first_dims = 256, other_dims = dims - first_dims;
  static constexpr int cluster = 2, queries = 64 * cluster, box_queries = 64, keys = 64;
  static constexpr int threads = warpgroup_threads * 4;  // scores, two of sums, copies
  static constexpr int atoms = (dims + atom_columns - 1) / atom_columns;
  static constexpr int q_atom = box_queries * atom_row_bytes;
  // A stage of keys is two atoms of 64 keys; one of values is all atoms of 16 values, eight always, so each block of
  // the cluster copies half of them.
  static constexpr int key_atom = keys * atom_row_bytes, stage_atoms = 2, stage_dims = stage_atoms * atom_columns;
  static constexpr int key_stages = 4, key_slabs = (dims + stage_dims - 1) / stage_dims;
  static constexpr int stage_values = 16, value_atom = stage_values * atom_row_bytes, value_atoms = 8;
  static constexpr int value_stages = 5, value_slabs = keys / stage_values;
  static constexpr int stage_bytes = stage_atoms * key_atom;
  static_assert(stage_bytes == value_atoms * value_atom && dims <= value_atoms * atom_columns);
  static constexpr int probability_bytes = box_queries * atom_row_bytes;
  static constexpr std::size_t shared_bytes =
      atom_alignment + atoms * q_atom + (key_stages + value_stages) * stage_bytes + 2 * probability_bytes;
  static constexpr int box_keys = keys, box_values = stage_values;
  static constexpr int score_registers = 120, sum_registers = 176, copying_registers = 24;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    split_head_attention_kernel(const __grid_constant__ AttentionBoxes boxes, AttentionShape shape,
                                Matrix<const bf16> q, AttentionKeys<bf16> source, Sequences sequences,
                                AttentionRows rows, Matrix<bf16> out, Matrix<float> lse) {
  if constexpr (with_warpgroups) {
    constexpr int keys = Traits::keys;
    __shared__ SharedBarrier queries_full, probabilities_full[2], probabilities_empty[2];
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
    const int count = (tile.keys + keys - 1) / keys;  // of tiles of keys
    const int group = threadIdx.x / warpgroup_threads, lane = threadIdx.x % 32;
    const int block = static_cast<int>(rank_in_cluster());
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;  // this lane's first, among the block's queries
    if (threadIdx.x == 0) {
      queries_full.init(1);
      of_keys.init(4 * Traits::cluster);
      of_values.init(8 * Traits::cluster);
      for (int s = 0; s < 2; ++s) {
        probabilities_full[s].init(warpgroup_threads);
        probabilities_empty[s].init(8);
      }
      barriers_initialised();
    }
    cluster_barrier();
    // A stage was read: both blocks write into it.
    const auto let_go = [&](SharedBarrier& empty) {
      if (lane < Traits::cluster) empty.arrive_at(lane);
    };

    if (group == 3) {
      shrink_registers<Traits::copying_registers>();
      constexpr std::uint16_t both = 3;
      const int head = tile.head / static_cast<int>(shape.heads / shape.kv_heads);
      const int warp = threadIdx.x / 32 % 4;
      if (lane == 0 && warp == 0) {
        queries_full.arrive_expecting(Traits::atoms * Traits::q_atom);
        for (int n = 0; n < Traits::atoms; ++n)
          copy_box(queries + n * Traits::q_atom, boxes.q, {n * atom_columns, tile.head, tile.token + 64 * block, 0},
                   queries_full);
        StageWalk<Traits::key_stages> walk;
        for (int j = 0; j < count; ++j)
          for (int slab = 0; slab < Traits::key_slabs; ++slab, walk.next()) {
            auto& full = of_keys.full[walk.stage];
            of_keys.empty[walk.stage].wait(walk.phase + 1);
            full.arrive_expecting(Traits::stage_bytes);
            copy_box_to(both, key_stages + walk.stage * Traits::stage_bytes + block * Traits::key_atom, boxes.k,
                        {slab * Traits::stage_dims + block * atom_columns, head, tile.first_key + j * keys, tile.row},
                        full);
          }
      } else if (lane == 0 && warp == 1) {
        StageWalk<Traits::value_stages> walk;
        for (int j = 0; j < count; ++j)
          for (int slab = 0; slab < Traits::value_slabs; ++slab, walk.next()) {
            auto& full = of_values.full[walk.stage];
            of_values.empty[walk.stage].wait(walk.phase + 1);
            full.arrive_expecting(Traits::stage_bytes);
            for (int n = block; n < Traits::value_atoms; n += Traits::cluster)
              copy_box_to(both, value_stages + walk.stage * Traits::stage_bytes + n * Traits::value_atom, boxes.v,
                          {n * atom_columns, head, tile.first_key + j * keys + slab * Traits::stage_values, tile.row},
                          full);
          }
      }
    } else if (group == 0) {
      shrink_registers<Traits::score_registers>();
      const int position = tile.position + 64 * block;  // of the block's first query
      const float scale = static_cast<float>(shape.scale) * log2_e;
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
        SharedBarrier* last = nullptr;
        const auto begin_slab = [&]<int Slab>(std::integral_constant<int, Slab>) {
          constexpr int first = Slab * Traits::stage_dims;
          constexpr int left = Traits::dims - first,
                        steps = (left < Traits::stage_dims ? left : Traits::stage_dims) / 16;
          of_keys.full[walk.stage].wait(walk.phase);
          products_begin();
          multiply_keys<keys, steps>(scores, queries + Slab * Traits::stage_atoms * Traits::q_atom, Traits::q_atom,
                                     key_stages + walk.stage * Traits::stage_bytes, Traits::key_atom, Slab > 0);
          products_commit();
          if constexpr (Slab > 0) {
            products_wait<1>();
            let_go(*last);
          }
          last = &of_keys.empty[walk.stage];
          walk.next();
        };
        [&]<int... Slab>(std::integer_sequence<int, Slab...>) {
          (begin_slab(std::integral_constant<int, Slab>{}), ...);
        }
        (std::make_integer_sequence<int, Traits::key_slabs>{});
        products_wait<0>();
        keep_in_place(scores);
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
        const float all = sum_of_row(softmax.total[half]);
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
        constexpr int atoms = (Columns + atom_columns - 1) / atom_columns;
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
          for (int k = 0; k < keys / 16; ++k) load_matrices(p[k], of_row + ((2 * k + lane / 16) ^ (a_row % 8)) * 16);
          __syncwarp();
          if (lane == 0) probabilities_empty[from.stage].arrive();
          from.next();
          scale_sums(sums, factor);
          SharedBarrier* last = nullptr;
          keep_in_place(sums);
          keep_in_place(p);
#pragma unroll
          for (int k = 0; k < Traits::value_slabs; ++k) {
            of_values.full[walk.stage].wait(walk.phase);
            std::byte* v = value_stages + walk.stage * Traits::stage_bytes + column / atom_columns * Traits::value_atom;
            const int valid = tile.keys - j * keys - k * Traits::stage_values;
            if (valid < Traits::stage_values) clear_rows<atoms>(v, Traits::value_atom, valid, Traits::stage_values);
            products_begin();
            add_values<Columns>(sums, p[k], v, Traits::value_atom);
            products_commit();
            if (k > 0) {
              products_wait<1>();
              let_go(*last);
            }
            last = &of_values.empty[walk.stage];
            walk.next();
          }
          products_wait<0>();
          keep_in_place(sums);
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
    cluster_barrier();  // a block stays while the other may write into it
  }
}

/// What the kernels above serve, and their launch.
class AttentionWarpgroups {
 public:
  /// Whether this GPU runs code for warpgroups, and AttentionTiles would take it too.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q,
                  const AttentionKeys<A>& keys, Matrix<A> out) {
    if (!AttentionTiles::fit(ctx, shape, q, keys, out)) return false;
    return with_kernel(shape.head_dim, [&]<class Traits>(Traits, auto* kernel) {
      // Only the code for warpgroups declares shared memory.
      cudaFuncAttributes compiled{};
      check_cuda(cudaFuncGetAttributes(&compiled, kernel), "attention");
      return compiled.sharedSizeBytes > 0 && compiled.sharedSizeBytes + Traits::shared_bytes <= ctx.most_shared();
    });
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, Matrix<const A> q, const AttentionKeys<A>& keys,
                     const Sequences& sequences, const AttentionRows& rows, Matrix<A> out, Matrix<float> lse) {
    with_kernel(shape.head_dim, [&]<class Traits>(Traits, auto* kernel) {
      Tensor<const A, 3> all_q(q.data, 1, q.rows(), q.cols());
      all_q.stride[1] = q.stride[0];
      const AttentionBoxes boxes{boxes_of_heads(all_q, shape.head_dim, Traits::box_queries),
                                 boxes_of_heads(keys.k, shape.head_dim, Traits::box_keys),
                                 boxes_of_heads(keys.v, shape.head_dim, Traits::box_values)};
      const Index tiles = (sequences.tokens / Traits::queries + sequences.rows) * shape.heads;
      allow_shared(kernel, Traits::shared_bytes, "attention");
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {Traits::cluster, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(tiles * Traits::cluster);
      config.blockDim = Traits::threads;
      config.dynamicSmemBytes = Traits::shared_bytes;
      config.stream = ctx.stream();
      config.attrs = &cluster;
      config.numAttrs = 1;
      check_cuda(cudaLaunchKernelEx(&config, kernel, boxes, shape, q, keys, sequences, rows, out, lse), "attention");
    });
  }

 private:
  template <class F>
  static auto with_kernel(Index head_dim, F&& f) {
    const auto whole = [&]<class Traits>(Traits traits) { return f(traits, whole_head_attention_kernel<Traits>); };
    const auto split = [&]<class Traits>(Traits traits) { return f(traits, split_head_attention_kernel<Traits>); };
    if (head_dim <= 64) return whole(WholeHeadTraits<64, 128, 2, 2>{});
    if (head_dim <= 80) return whole(WholeHeadTraits<80, 128, 2, 2>{});
    if (head_dim <= 128) return whole(WholeHeadTraits<128, 128, 2, 2>{});
    if (head_dim <= 160) return whole(WholeHeadTraits<160, 96, 2, 2>{});
    if (head_dim <= 224) return whole(WholeHeadTraits<224, 64, 2, 2>{});
    if (head_dim <= 256) return whole(WholeHeadTraits<256, 64, 2, 2>{});
    if (head_dim <= 464) return split(SplitHeadTraits<464>{});
    return split(SplitHeadTraits<512>{});
  }
};

}  // namespace zamba::detail
