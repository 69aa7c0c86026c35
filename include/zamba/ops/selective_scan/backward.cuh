// SPDX-License-Identifier: MIT
// The backward pass of selective_scan on CUDA in float for up to 16 states, by warp-specialised producers and consumers
// as the forward pass in prefill.cuh. With dyp = dy silu(z), and g_t = dL/ds_t,
//
//   g_t  = C_t dyp_t + exp(dt_{t+1} A) g_{t+1}
//   dB_t = sum_channels g_t dt_t u_t                    dC_t = sum_channels dyp_t s_t
//   d dt_t = sum_n g_t (A exp(dt_t A) s_{t-1} + B_t u_t)    dA = sum_t g_t dt_t exp(dt_t A) s_{t-1}
//
// A block takes 64 neighbouring channels of one head, or 32 where shared memory is small, through its rows, each from
// its last chunk to its first. A consumer (backward_consumer.cuh) has four states of two channels. From the states that
// are kept where a chunk begins it computes those where each group of four tokens begins; later, from the last group to
// the first, the group's states and decays once more, now into registers, and from these the adjoint states g. So an
// exp is computed twice, and no state leaves the multiprocessor. Producers (backward_producer.cuh) do what is done once
// a token and channel.
//
// A chunk is eight stages of eight tokens. One barrier ends a step, of chunk k here:
//
//   consumers    adjoints 7, states 0 of k - 1    adjoints 6, states 1 of k - 1    adjoints 5, states 2 of k - 1   ...
//   producers    finish 0 of k + 1, outputs 6     finish 7, outputs 5              finish 6, outputs 4             ...
//
// A producer finishes a stage, adding up what its consumers left of each token and channel, and prepares the steps of
// another in its place (ScanSlots), ten stages ahead. What only adjoints need ("outputs") it prepares one stage ahead.
//
// The order of sums. Over n: four neighbouring ones in order, then these by pairs. dB and dC: eight channels by tensor
// cores (channel_sums.cuh), such parts of a block in order, then the blocks of a head. Parameters: tokens from last to
// first, those at the same place of stages together, rows of a group in order, then groups.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/backward_consumer.cuh>
#include <zamba/ops/selective_scan/backward_producer.cuh>

namespace zamba::kernel {

/// What the backward pass leaves for sums over blocks.
template <class F>
struct ScanPartials {
  Tensor<F, 3> BC;          // (tiles, tokens, 2 N): each tile's share of dB, then of dC
  Tensor<F, 3> parameters;  // (groups of rows, D, N + 2): dA, then dD, then d delta_bias
  Tensor<F, 3> adjoints;    // (groups, N, D), for a kernel that keeps adjoint states in memory
};

/// dD and d delta_bias of a block, of producers with the same channels: in the order of their tokens.
template <class Traits>
__device__ void sum_producers(float (*memory)[Traits::tokens][Traits::channels],
                              const ScanBackwardProducer<Traits>* producer, const ScanTile& tile, Index N,
                              const Matrix<float>& to) {
  if (producer)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      memory[0][producer->token][4 * producer->quad + i] = producer->d_skip[i];
      memory[1][producer->token][4 * producer->quad + i] = producer->d_bias[i];
    }
  __syncthreads();
  const int channel = threadIdx.x % Traits::channels, which = threadIdx.x / Traits::channels;
  if (which > 1 || channel >= tile.width) return;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < Traits::tokens; ++k) sum += memory[which][k][channel];
  to(tile.channel + channel, N + which) = sum;
}

/// What a block works on: rows `first` to `end` of a tile.
struct ScanRows {
  ScanTile tile;
  Index first, end;
};

template <class Traits>
__device__ void consume_rows(ScanBackwardConsumer<Traits>& consumer, const ScanRows& rows, const Sequences& sequences,
                             const Tensor<const float, 3>& checkpoints, const Tensor<float, 3>& d_state,
                             const Matrix<float>& parameters) {
  int buffer = 0;
  for (Index row = rows.first; row < rows.end; ++row) {
    const ScanChunks<Traits> chunks(sequences.length(row));
    if (chunks.length == 0) continue;
    consumer.begin_row(d_state, row);
    consumer.through_row(chunks, checkpoints, sequences.begin(row) / scan_chunk + row, buffer);
    consumer.end_row(d_state, row, sequences.start(row) > 0);
  }
  consumer.store_parameters(parameters);
}

template <class Traits>
__device__ void produce_rows(ScanBackwardProducer<Traits>& producer, const ScanRows& rows, const Sequences& sequences,
                             const SelectiveScanInputs<typename Traits::A, float>& in,
                             const Matrix<const typename Traits::A>& d_y,
                             const SelectiveScanGradients<typename Traits::A, float>& out, const Matrix<float>& part) {
  int buffer = 0;
  for (Index row = rows.first; row < rows.end; ++row) {
    const ScanChunks<Traits> chunks(sequences.length(row));
    if (chunks.length == 0) continue;
    producer.begin_row(in, d_y, out, part, rows.tile, sequences.begin(row));
    producer.through_row(chunks, buffer);
  }
}

/// Rows blockIdx.x / tiles * rows_each and on, of a tile of channels.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    selective_scan_backward_kernel(SelectiveScanInputs<typename Traits::A, float> in,
                                   Matrix<const typename Traits::A> d_y, Sequences sequences,
                                   Tensor<const float, 3> checkpoints,
                                   SelectiveScanGradients<typename Traits::A, float> out, Tensor<float, 3> d_state,
                                   ScanPartials<float> partials, Index rows_each) {
  extern __shared__ float4 scan_backward_memory[];
  auto& shared = *reinterpret_cast<ScanBackwardShared<Traits>*>(scan_backward_memory);
  auto* sums = reinterpret_cast<float(*)[Traits::tokens][Traits::channels]>(shared.starts);  // free at the end
  launch_dependents();
  grid_dependency_wait();
  const ScanTile tile = scan_tile(in, Traits::channels);
  const ScanRows rows{tile, tile.row * rows_each, ::min((tile.row + 1) * rows_each, sequences.rows)};
  const Matrix<float> parameters = partials.parameters[tile.row];
  const int thread = threadIdx.x % Traits::consumers;
  if (threadIdx.x < Traits::consumers) {
    ScanBackwardConsumer<Traits> consumer(shared, thread, in, tile);
    consume_rows(consumer, rows, sequences, checkpoints, d_state, parameters);
    sum_producers<Traits>(sums, nullptr, tile, in.B.shape[2], parameters);
  } else {
    ScanBackwardProducer<Traits> producer(shared, thread, in, tile);
    const auto tiles = static_cast<unsigned>(partials.BC.shape[0]);
    produce_rows(producer, rows, sequences, in, d_y, out, partials.BC[blockIdx.x % tiles]);
    sum_producers<Traits>(sums, &producer, tile, in.B.shape[2], parameters);
  }
}

}  // namespace zamba::kernel
