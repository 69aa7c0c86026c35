// SPDX-License-Identifier: MIT
// Gradients by warpgroups with rows of their own, by wgmma and TMA: see backward_sm90.cuh. A block owns 128 rows X,
// keys or queries; tiles of columns Y pass by, in two rings.
//
//                own keys                               own queries
//   consumers    S^T = K Q^T,     d_v += P^T d_out      S = Q K^T             two warpgroups of 64 rows each
//                dP^T = V d_out^T, d_k += dS^T Q        dP = d_out V^T, d_q += dS K
//   producer     a warp loads K, Q and lse; another V, d_out and d_out . out
//
// Products of a tile are queued with the sums of the tile before, so that the tensor cores work while P and dS are
// computed. A thread holds both sums of keys only where heads are narrow.
#pragma once

#include <cstdint>

#include <zamba/ops/attention/backward_sm90_passing.cuh>
#include <zamba/ops/attention/backward_tile.cuh>
#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// What sums read, Q or K always, is read again a tile later, so that it needs more stages than V.
template <bool OwnsQueries_, int Dims_, int Columns_, int FirstStages_, int SecondStages_>
struct AttentionRowTraits : AttentionPassingTraits<OwnsQueries_, Dims_, 128, Columns_, FirstStages_, SecondStages_, 1> {
  using Base = AttentionPassingTraits<OwnsQueries_, Dims_, 128, Columns_, FirstStages_, SecondStages_, 1>;
  static constexpr int pair_exponent = 0;
  static constexpr std::size_t shared_bytes = Base::tile_bytes;
};

/// A consumer: gradients of 64 rows.
template <class Traits>
struct AttentionRowConsumer {
  static constexpr int columns = Traits::columns, steps = columns / 16;
  static constexpr bool owns_keys = !Traits::owns_queries;
  using Sums = Fragment<1, Traits::dims / 8>;
  const AttentionPassingShared<Traits>& shared;
  const PassedRows& tile;
  int row;                       // the lane's first
  float scale;                   // of scores, times log2(e)
  std::uint64_t x1, x2, y1, y2;  // shared-memory descriptors: what is owned, and the rings, for the products;
  std::uint64_t rows1, rows2;    // the rings, for the sums
  PipelineState<Traits::template stages<0>> y1_at = {}, rows1_at = {};
  PipelineState<Traits::template stages<1>> y2_at = {}, rows2_at = {};
  Fragment<1, columns / 8> s, d_p;  // (64 x columns): S, then P; dP, then dS
  OperandFragment<1, steps> d_s;    // (64 x columns), rounded
  OperandFragment<1, owns_keys ? steps : 1> p;
  Sums o1 = {};                                           // (64 x dims): d_q or d_k
  Fragment<1, owns_keys ? Traits::dims / 8 : 1> o2 = {};  // (64 x dims): d_v
  float lse[2], dot[2];                                   // of the lane's rows, if they are queries

  __device__ __forceinline__ AttentionRowConsumer(const AttentionPassingShared<Traits>& shared, const PassedRows& tile,
                                                  int group, float scale, const Tensor<float, 3>& sums)
      : shared(shared),
        tile(tile),
        row(64 * group + threadIdx.x / 32 % 4 * 16 + Sums::first_row()),
        scale(scale),
        x1(shared_descriptor(shared.owned(0) + 64 * group * atom_row_bytes)),
        x2(shared_descriptor(shared.owned(1) + 64 * group * atom_row_bytes)),
        y1(shared_descriptor(shared.template passing<0>())),
        y2(shared_descriptor(shared.template passing<1>())),
        rows1(shared_descriptor(shared.template passing<0>(), Traits::passing_atom)),
        rows2(shared_descriptor(shared.template passing<1>(), Traits::passing_atom)) {
    if constexpr (!owns_keys) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = tile.owned.position + ::min(row + 8 * r, tile.rows - 1);
        lse[r] = number_of_query<0, Traits>(sums, tile.owned.head, token);
        dot[r] = number_of_query<1, Traits>(sums, tile.owned.head, token);
      }
    }
  }

  static __device__ __forceinline__ void release(Mbarrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
  }

  __device__ __forceinline__ void begin_scores(int at) {
    shared.template wait_passing<1, 2>(y2_at, owns_keys ? tile.columns - at : columns);
    shared.template wait_passing<0, 2>(y1_at, tile.columns - at);
    wgmma_fence();
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        s, x1, y1 + y1_at.stage * descriptor_step(Traits::stage_bytes), false);
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        d_p, x2, y2 + y2_at.stage * descriptor_step(Traits::stage_bytes), false);
    wgmma_commit();
  }

  /// P and dS of the lane's row r and column c, of a query with these numbers.
  __device__ __forceinline__ void update(int r, int c, float of_lse, float of_dot) {
    s.at(r, c) = exp2_approximate(::fmaf(s.at(r, c), scale, -of_lse));
    d_p.at(r, c) = s.at(r, c) * (d_p.at(r, c) - of_dot);
  }
  /// Of the tile from column `at` on, whose products are done: S becomes P, dP dS.
  __device__ __forceinline__ void end_scores(int at) {
    fence_operand(s.sums);
    fence_operand(d_p.sums);
    const auto* lse_of = reinterpret_cast<const float2*>(shared.template numbers<0>(y1_at.stage)) + threadIdx.x % 4;
    const auto* dot_of = reinterpret_cast<const float2*>(shared.template numbers<1>(y2_at.stage)) + threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < columns / 8; ++n) {
      float2 of_lse{}, of_dot{};
      if constexpr (owns_keys) of_lse = lse_of[4 * n], of_dot = dot_of[4 * n];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (!owns_keys) of_lse = {lse[r], lse[r]}, of_dot = {dot[r], dot[r]};
        update(r, 2 * n, of_lse.x, of_dot.x);
        update(r, 2 * n + 1, of_lse.y, of_dot.y);
      }
    }
    mask(at);
    if constexpr (!owns_keys) release(shared.barriers.second.empty[y2_at.stage]);
    y1_at.advance();
    y2_at.advance();
  }
  /// Zero where a key is after the query, or the column after the last. at: the tile's first column.
  __device__ __forceinline__ void mask(int at) {
    const int left = tile.columns - at, diagonal = tile.diagonal - at, first = row - s.first_row();
    const bool crossed = owns_keys ? first + 15 + diagonal > 0 : columns - 1 > first + diagonal;
    if (left >= columns && !crossed) return;
    const int column = s.first_column(), last = row + diagonal;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < s.columns; ++c) {
        const int of_tile = column + 8 * (c / 2) + c % 2;
        const bool hidden = owns_keys ? of_tile < last + 8 * r : of_tile > last + 8 * r;
        if (of_tile >= left || hidden) s.at(r, c) = d_p.at(r, c) = 0;
      }
  }

  __device__ __forceinline__ void begin_sums() {
    d_s = d_p.operand();
    fence_operand(o1.sums);
    fence_operand(d_s.tile[0]);
    if constexpr (owns_keys) {
      p = s.operand();
      fence_operand(o2.sums);
      fence_operand(p.tile[0]);
    }
  }
  /// Queues the sums of the tile whose dS and P were rounded.
  __device__ __forceinline__ void queue_sums() {
    const std::uint64_t first = rows1 + rows1_at.stage * descriptor_step(Traits::stage_bytes);
    const std::uint64_t second = rows2 + rows2_at.stage * descriptor_step(Traits::stage_bytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const std::uint64_t down = descriptor_step(k * 16 * atom_row_bytes);
      if constexpr (owns_keys) add_values<Traits::passing_atom>(o2, p.tile[0][k], second + down);
      add_values<Traits::passing_atom>(o1, d_s.tile[0][k], first + down);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void end_sums() {
    wgmma_wait<0>();
    fence_operand(o1.sums);
    release(shared.barriers.first.empty[rows1_at.stage]);
    rows1_at.advance();
    if constexpr (owns_keys) {
      fence_operand(o2.sums);
      release(shared.barriers.second.empty[rows2_at.stage]);
      rows2_at.advance();
    }
  }

  /// All tiles.
  __device__ __forceinline__ void run() {
    shared.barriers.owned_full[0].wait(0);
    shared.barriers.owned_full[1].wait(0);
    PassingTile<Traits> at(tile);
    begin_scores(at.first);
    wgmma_wait<0>();
    end_scores(at.first);
    begin_sums();
    for (at.advance(); at.more(); at.advance()) {
      begin_scores(at.first);
      queue_sums();
      wgmma_wait<1>();
      end_scores(at.first);
      end_sums();
      begin_sums();
    }
    queue_sums();
    end_sums();
  }

  /// Writes the gradients; scale: of scores.
  __device__ __forceinline__ void store(const QueryTile& of, const AttentionShape& shape,
                                        const AttentionBackwardTensors<bf16>& at, float scale) const {
    of.store(o1, RowValues<2>::filled(scale), row - Sums::first_row(), 0, static_cast<int>(shape.head_dim), at.d_q);
  }
  __device__ __forceinline__ void store(const KeyTile<Traits::rows>& of, const AttentionShape& shape,
                                        const AttentionBackwardTensors<bf16>& at, float scale) const {
    of.put(at.d_k, o1, row, 0, shape.head_dim, scale);
    of.put(at.d_v, o2, row, 0, shape.head_dim, 1);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_backward_sm90_rows_kernel(const __grid_constant__ AttentionBackwardMaps maps, AttentionShape shape,
                                        AttentionBackwardTensors<bf16> at, AttentionKeys<bf16> source,
                                        Sequences sequences) {
  if constexpr (has_wgmma) {
    __shared__ AttentionPassingBarriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const typename Traits::Tile tile(Traits{}, shape, at, source, sequences);
    if (tile.rows == 0) return;
    const AttentionPassingShared<Traits> shared(barriers, dynamic);
    if (threadIdx.x == 0) {
      barriers.init(4 * Traits::consumers, 4 * Traits::consumers);
      fence_mbarrier_init();
    }
    __syncthreads();

    const int group = threadIdx.x / warpgroup_threads;
    if (group == Traits::consumers) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int warp = threadIdx.x / 32 % 4;
      if (warp == 0)
        load_passing<0>(shared, maps, tile, at.sums, 0);
      else if (warp == 1)
        load_passing<1>(shared, maps, tile, at.sums, 0);
    } else {
      setmaxnreg_inc<Traits::consumer_registers>();
      const float scale = static_cast<float>(shape.scale);
      AttentionRowConsumer<Traits> consumer(shared, tile, group, scale * log2_e, at.sums);
      consumer.run();
      consumer.store(tile.tile, shape, at, scale);
    }
  }
}

}  // namespace zamba::kernel
