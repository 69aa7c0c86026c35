// SPDX-License-Identifier: MIT
// Gradients by two warpgroups that share the pairs of a block, by wgmma and TMA: see backward_sm90.cuh. A block owns 64
// rows X, keys or queries; tiles of columns Y pass by, in two rings.
//
//                 own keys                                own queries
//   probabilities S^T = K Q^T, P^T; d_v += P^T d_out      S = Q K^T, P                              warpgroup 0
//   scores        dP^T = V d_out^T, dS^T; d_k += dS^T Q   dP = d_out V^T, dS; d_q += dS K           warpgroup 1
//   producer      a warp loads K, Q and lse; another V, d_out and d_out . out                       warpgroup 2
//
// P passes from warpgroup 0 to 1 through shared memory, every thread's to the thread of the same place. Products of a
// tile are queued with the sums of the tile before, so that the tensor cores work while P and dS are computed.
//
// Wide heads: two blocks are a cluster, and each has half of the dimensions of the same rows: of its products, which
// are then added to those of the other one, and of its sums.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_fp16.h>

#include <zamba/ops/attention/backward_sm90_passing.cuh>
#include <zamba/ops/attention/backward_tile.cuh>
#include <zamba/ops/attention/tile_sm90.cuh>

namespace zamba::kernel {

/// Stages of Q or K are read for the scores, and again for the sums, much later: two of them would keep warpgroups
/// waiting.
template <bool OwnsQueries_, int Dims_, int Columns_, int FirstStages_, int SecondStages_, int Blocks_ = 1,
          bool Ahead_ = false>
struct AttentionPairTraits
    : AttentionPassingTraits<OwnsQueries_, Dims_, 64, Columns_, FirstStages_, SecondStages_, Blocks_> {
  using Base = AttentionPassingTraits<OwnsQueries_, Dims_, 64, Columns_, FirstStages_, SecondStages_, Blocks_>;
  static constexpr bool ahead = Ahead_;
  static constexpr int pair_exponent = 14;  // P passes as 2^14 P in fp16, 11 bits of it from 2^-28 on
  static constexpr int pair_vectors = Columns_ / 16 * warpgroup_threads, pair_stages = 2;
  static constexpr int partial_vectors = Blocks_ > 1 ? Columns_ / 8 * warpgroup_threads : 0;  // of S, in float
  static constexpr int partial_bytes = partial_vectors * static_cast<int>(sizeof(float4));
  static constexpr std::size_t shared_bytes =
      Base::tile_bytes + pair_stages * pair_vectors * sizeof(uint4) + 2 * partial_bytes;
};

template <class Traits>
struct AttentionPairBarriers : AttentionPassingBarriers<Traits> {
  PipelineBarriers<Traits::pair_stages> pairs;
  PipelineBarriers<1> partial[2];  // empty: the other block has read what was sent

  __device__ void init() {
    AttentionPassingBarriers<Traits>::init(8, Traits::owns_queries ? 4 : 8);
    pairs.init(warpgroup_threads, warpgroup_threads);
    for (auto& of_group : partial) of_group.init(1, warpgroup_threads);
    fence_mbarrier_init();
  }
};

template <class Traits>
struct AttentionPairShared : AttentionPassingShared<Traits> {
  AttentionPairBarriers<Traits>& barriers;
  uint4* pairs;      // (pair_stages, pair_vectors)
  float4* partials;  // (2, partial_vectors): what the other block of the cluster sent

  __device__ AttentionPairShared(AttentionPairBarriers<Traits>& barriers, void* dynamic)
      : AttentionPassingShared<Traits>(barriers, dynamic),
        barriers(barriers),
        pairs(reinterpret_cast<uint4*>(this->template passing<0>(Traits::all_stages))),
        partials(reinterpret_cast<float4*>(pairs + Traits::pair_stages * Traits::pair_vectors)) {}
};

/// A consumer: I is 0 for that of probabilities, 1 for that of scores.
template <class Traits, int I>
struct AttentionPairConsumer {
  static constexpr int columns = Traits::columns, steps = columns / 16;
  static constexpr bool has_sums = I == 1 || !Traits::owns_queries;
  using Pairs = OperandFragment<1, steps>;
  const AttentionPairShared<Traits>& shared;
  const PassedRows& tile;
  float scale;                     // of scores, times log2(e)
  std::uint64_t own, first, rows;  // shared-memory descriptors: what is owned, its ring, the ring of the sums
  PipelineState<Traits::template stages<I>> first_at = {}, x_at = {};
  PipelineState<Traits::template stages<1 - I>> sums_at = {};
  PipelineState<Traits::pair_stages> pairs_at = {};
  PipelineState<1> partial_at = {};
  Fragment<1, columns / 8> s, x;                        // (64 x columns): products under way; those taken, then P or dS
  Pairs p;                                              // (64 x columns): P or dS, rounded
  Fragment<1, has_sums ? Traits::dims / 8 : 1> o = {};  // (64 x dims)
  float number[2];                                      // of the lane's rows, if they are queries

  __device__ __forceinline__ AttentionPairConsumer(const AttentionPairShared<Traits>& shared, const PassedRows& tile,
                                                   float scale, const Tensor<float, 3>& sums)
      : shared(shared),
        tile(tile),
        scale(scale),
        own(shared_descriptor(shared.owned(I))),
        first(shared_descriptor(shared.template passing<I>())),
        rows(shared_descriptor(shared.template passing<1 - I>(), Traits::passing_atom)) {
    if constexpr (Traits::owns_queries) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = tile.owned.position + ::min(row() + 8 * r, tile.rows - 1);
        number[r] = number_of_query<I, Traits>(sums, tile.owned.head, token);
      }
    }
  }

  /// The lane's first row.
  static __device__ __forceinline__ int row() { return threadIdx.x / 32 % 4 * 16 + Fragment<1, 1>::first_row(); }
  static __device__ __forceinline__ int thread() { return threadIdx.x % warpgroup_threads; }

  static __device__ __forceinline__ void release(Mbarrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
  }

  __device__ __forceinline__ void begin_scores(int at) {
    shared.template wait_passing<I, 1>(first_at, tile.columns - at);
    wgmma_fence();
    multiply_keys<Traits::dims / 16, Traits::owned_atom, Traits::passing_atom>(
        s, own, first + first_at.stage * descriptor_step(Traits::stage_bytes), false);
    wgmma_commit();
    first_at.advance();
  }

  /// Takes the products that are done, and sends them to the other block.
  template <int Groups>
  __device__ __forceinline__ void take_scores() {
    wgmma_wait<Groups>();
    fence_operand(s.sums);
    x = s;
    if constexpr (Traits::blocks > 1) {
      auto& barriers = shared.barriers.partial[I];
      float4* const partial = shared.partials + I * Traits::partial_vectors + thread();
      barriers.empty[0].wait(partial_at.phase + 1);
      if (thread() == 0) barriers.full[0].arrive_expect_tx(Traits::partial_bytes);
#pragma unroll
      for (int n = 0; n < columns / 8; ++n)
        store_async(partial + n * warpgroup_threads, cluster_rank() ^ 1, x.tile(0, n), barriers.full[0]);
    }
  }
  /// Adds the products of the other block, over the other dimensions. Both add the same two numbers.
  __device__ __forceinline__ void add_other_block() {
    auto& barriers = shared.barriers.partial[I];
    const float4* const partial = shared.partials + I * Traits::partial_vectors + thread();
    barriers.full[0].wait(partial_at.phase);
#pragma unroll
    for (int n = 0; n < columns / 8; ++n) {
      const float4 more = partial[n * warpgroup_threads];
      float(&tile)[4] = x.tile(0, n);
      tile[0] += more.x;
      tile[1] += more.y;
      tile[2] += more.z;
      tile[3] += more.w;
    }
    barriers.empty[0].arrive_at(cluster_rank() ^ 1);
    partial_at.advance();
  }

  /// The number of the query of row r and column 8n + c of the lane.
  __device__ __forceinline__ float number_of(const float2* of_columns, int r, int n, int c) const {
    if constexpr (Traits::owns_queries) return number[r];
    return c == 0 ? of_columns[4 * n].x : of_columns[4 * n].y;
  }
  /// S becomes P.
  __device__ __forceinline__ void exponentiate(const float2* of_columns) {
#pragma unroll
    for (int n = 0; n < columns / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& e = x.at(r, 2 * n + c);
          e = exp2_approximate(::fmaf(e, scale, -number_of(of_columns, r, n, c)));
        }
  }
  /// dP becomes dS, with P of the other warpgroup.
  __device__ __forceinline__ void multiply_pairs(const float2* of_columns) {
    shared.barriers.pairs.full[pairs_at.stage].wait(pairs_at.phase);
    const uint4* pairs = shared.pairs + pairs_at.stage * Traits::pair_vectors + thread();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const uint4 of_step = pairs[k * warpgroup_threads];
      const unsigned words[] = {of_step.x, of_step.y, of_step.z, of_step.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2, n = 2 * k + i / 2;
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        float &even = x.at(r, 2 * n), &odd = x.at(r, 2 * n + 1);
        even = pair.x * (even - number_of(of_columns, r, n, 0));
        odd = pair.y * (odd - number_of(of_columns, r, n, 1));
      }
    }
    shared.barriers.pairs.empty[pairs_at.stage].arrive();
    pairs_at.advance();
  }
  /// P goes to the other warpgroup.
  __device__ __forceinline__ void hand_on() {
    shared.barriers.pairs.empty[pairs_at.stage].wait(pairs_at.phase + 1);
    uint4* to = shared.pairs + pairs_at.stage * Traits::pair_vectors + thread();
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2, n = 2 * k + i / 2;
        const __half2 pair = __floats2half2_rn(x.at(r, 2 * n), x.at(r, 2 * n + 1));
        words[i] = reinterpret_cast<const unsigned&>(pair);
      }
      to[k * warpgroup_threads] = {words[0], words[1], words[2], words[3]};
    }
    shared.barriers.pairs.full[pairs_at.stage].arrive();
    pairs_at.advance();
  }

  /// Zero where a key is after the query, or the column after the last. at: the tile's first column.
  __device__ __forceinline__ void mask(int at) {
    constexpr bool causal = I == 0, owns_queries = Traits::owns_queries;
    const int left = tile.columns - at, diagonal = tile.diagonal - at;
    const bool crossed = owns_queries ? columns - 1 > diagonal : Traits::rows - 1 + diagonal > 0;
    if (left >= columns && !(causal && crossed)) return;
    const int column = x.first_column(), last = row() + diagonal;
    x.for_each([&](float& e, int r, int c) {
      const bool hidden = owns_queries ? column + c > last + r : column + c < last + r;
      if (column + c >= left || (causal && hidden)) e = 0;
    });
  }

  /// Of the tile from column `at` on: x becomes P or dS.
  __device__ __forceinline__ void end_scores(int at) {
    if constexpr (Traits::blocks > 1) add_other_block();
    const auto* of_columns = reinterpret_cast<const float2*>(shared.template numbers<I>(x_at.stage)) + threadIdx.x % 4;
    if constexpr (I == 0)
      exponentiate(of_columns);
    else
      multiply_pairs(of_columns);
    mask(at);
    release(shared.barriers.template passing<I>().empty[x_at.stage]);
    x_at.advance();
    if constexpr (I == 0) hand_on();
  }

  __device__ __forceinline__ void begin_sums() {
    if constexpr (!has_sums) return;
    shared.barriers.template passing<1 - I>().full[sums_at.stage].wait(sums_at.phase);
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
    if constexpr (!has_sums) return;
    fence_operand(o.sums);
    release(shared.barriers.template passing<1 - I>().empty[sums_at.stage]);
    sums_at.advance();
  }

  /// All tiles.
  __device__ __forceinline__ void run() {
    PassingTile<Traits> at(tile);
    shared.barriers.owned_full[I].wait(0);
    begin_scores(at.first);
    take_scores<0>();
    if constexpr (Traits::ahead) {
      int before = at.first;
      at.advance();
      if (at.more()) {
        begin_scores(at.first);
        end_scores(before);
        p = x.operand();
        before = at.first;
        for (at.advance(); at.more(); at.advance()) {
          take_scores<0>();
          begin_sums();
          begin_scores(at.first);
          end_scores(before);
          wgmma_wait<1>();
          end_sums();
          p = x.operand();
          before = at.first;
        }
        take_scores<0>();
        begin_sums();
        end_scores(before);
        wgmma_wait<0>();
        end_sums();
        p = x.operand();
      } else {
        end_scores(before);
        p = x.operand();
      }
    } else {
      end_scores(at.first);
      p = x.operand();
      for (at.advance(); at.more(); at.advance()) {
        begin_scores(at.first);
        begin_sums();
        take_scores<has_sums>();
        end_scores(at.first);
        wgmma_wait<0>();
        end_sums();
        p = x.operand();
      }
    }
    begin_sums();
    wgmma_wait<0>();
    end_sums();
  }

  /// Writes the sums, times `factor`; their first dimension is `column`.
  __device__ __forceinline__ void store(const QueryTile& of, int column, const AttentionShape& shape,
                                        const AttentionBackwardTensors<bf16>& at, float factor) const {
    of.store(o, RowValues<2>::filled(factor), threadIdx.x / 32 % 4 * 16, column, static_cast<int>(shape.head_dim),
             at.d_q);
  }
  __device__ __forceinline__ void store(const KeyTile<Traits::rows>& of, int column, const AttentionShape& shape,
                                        const AttentionBackwardTensors<bf16>& at, float factor) const {
    of.put(I == 0 ? at.d_v : at.d_k, o, row(), column, shape.head_dim, factor);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_backward_sm90_pairs_kernel(const __grid_constant__ AttentionBackwardMaps maps, AttentionShape shape,
                                         AttentionBackwardTensors<bf16> at, AttentionKeys<bf16> source,
                                         Sequences sequences) {
  if constexpr (has_wgmma) {
    __shared__ AttentionPairBarriers<Traits> barriers;
    extern __shared__ uint4 dynamic[];
    const typename Traits::Tile tile(Traits{}, shape, at, source, sequences);
    if (tile.rows == 0) return;
    const AttentionPairShared<Traits> shared(barriers, dynamic);
    const auto sync = [] {
      if constexpr (Traits::blocks > 1)
        cluster_sync();
      else
        __syncthreads();
    };
    if (threadIdx.x == 0) barriers.init();
    sync();

    const int group = threadIdx.x / warpgroup_threads;
    const int column = Traits::blocks > 1 ? static_cast<int>(cluster_rank()) * Traits::dims : 0;
    const float scale = static_cast<float>(shape.scale), of_pairs = ::exp2f(-Traits::pair_exponent);
    if (group == 2) {
      setmaxnreg_dec<Traits::producer_registers>();
      const int warp = threadIdx.x / 32 % 4;
      if (warp == 0)
        load_passing<0>(shared, maps, tile, at.sums, column);
      else if (warp == 1)
        load_passing<1>(shared, maps, tile, at.sums, column);
    } else if (group == 0) {
      setmaxnreg_inc<Traits::consumer_registers>();
      AttentionPairConsumer<Traits, 0> consumer(shared, tile, scale * log2_e, at.sums);
      consumer.run();
      if constexpr (consumer.has_sums) consumer.store(tile.tile, column, shape, at, of_pairs);
    } else {
      setmaxnreg_inc<Traits::consumer_registers>();
      AttentionPairConsumer<Traits, 1> consumer(shared, tile, scale * log2_e, at.sums);
      consumer.run();
      consumer.store(tile.tile, column, shape, at, scale * of_pairs);
    }
    if constexpr (Traits::blocks > 1) cluster_sync();  // a block stays while the other may write into it
  }
}

}  // namespace zamba::kernel
