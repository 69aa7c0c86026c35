// SPDX-License-Identifier: MIT
// What producers and consumers of backward.cuh hand to each other in shared memory.
#pragma once

#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan/channel_sums.cuh>
#include <zamba/ops/selective_scan/step.cuh>
#include <zamba/ops/selective_scan/strips.hpp>

namespace zamba::kernel {

/// A backward scan in float. Wide_: all rows of activations begin at multiples of four elements, and heads and states
/// come in fours.
template <class A_, bool Wide_>
struct ScanBackwardTraits {
  using A = A_;
  static constexpr bool wide = Wide_;
  static constexpr bool exact = sizeof(A) > 2;  // whether dB and dC are summed with all bits of a float
  static constexpr int slices = 4, states = 4, most_states = slices * states;
  static constexpr int channels = 32, pairs = channels / 2, quads = channels / 4;  // of a block
  static constexpr int tokens = 8;                                                 // of a stage
  static constexpr int group = 4, groups = tokens / group;  // of a stage: tokens of which a consumer has all states
  static constexpr int consumers = pairs * slices, producers = quads * tokens;  // threads
  static constexpr int threads = consumers + producers, blocks = 2;             // of a multiprocessor, at least
  static constexpr int chunk = static_cast<int>(scan_chunk), stages = chunk / tokens;
  static constexpr int parts = channels / 8;                    // of dB and dC
  static constexpr float BC_scale = ChannelSums<exact>::scale;  // what their sums still have to be multiplied by
  static_assert(consumers == producers, "zamba: the halves of a block take turns");
  static_assert(scan_chunk % tokens == 0 && tokens % group == 0, "zamba: chunks are stages, and stages groups");
};

/// The shared memory of a block. Threads meet different banks everywhere.
template <class Traits>
struct ScanBackwardShared {
  static constexpr int channels = Traits::channels, slices = Traits::slices;
  enum Sum { C_s, g_B, d_dt, sums_count };  // sums over states: the last of g A log2(e) exp(dt A) s

  /// What states of a token are computed from, and what its producer keeps.
  struct Token {
    float4 steps[Traits::pairs + slices];  // step_place(): dt and dt, then dt u and dt u; B_place(): B
    float slopes[channels];                // d dt / d delta
    AlignedVector<typename Traits::A, 4> u[Traits::quads];
  };
  /// What its adjoint states are computed from, and what is left of them.
  struct Output {
    float4 C[slices];
    float d_y[channels];                                       // d y silu(z)
    float d_z[channels];                                       // d y silu'(z)
    float sums[sums_count][channels / 16][(slices + 1) * 16];  // of 16 channels: those of each slice
    float4 parts[Traits::parts][2 * slices];                   // part_place(): of dB, then of dC
    float4 unused[5];                                          // so that tokens are 16 bytes from each other
  };
  static_assert(sizeof(Output) % 128 == 16, "zamba: parts of four tokens are written to different banks");

  Token tokens[Traits::chunk];                                         // from place() on
  Output outputs[2][Traits::tokens];                                   // of two stages in turn, called buffers
  float4 starts[Traits::chunk / Traits::group][2][Traits::consumers];  // states where groups begin, of each channel

  /// Where the first token of a stage is. Chunks take turns; in every second one stages are in reverse.
  __device__ static int place(int turn, int stage) {
    return (turn % 2 ? Traits::stages - 1 - stage : stage) * Traits::tokens;
  }
  /// Even pairs of channels, B, odd pairs.
  __device__ static int step_place(int pair) { return pair % 2 * B_place(slices) + pair / 2; }
  __device__ static int B_place(int slice) { return Traits::pairs / 2 + slice; }
  __device__ static int part_place(int quad, int part) { return quad ^ part % 2 * 4; }
};

/// How the chunks of a row are walked through.
template <class Traits>
struct ScanChunks {
  int length, count;
  __device__ explicit ScanChunks(Index length)
      : length(static_cast<int>(length)), count(ceil_div(this->length, Traits::chunk)) {}
  __device__ int turn(int chunk) const { return count - 1 - chunk; }
  __device__ int stages(int chunk) const {
    return ceil_div(::min(length - chunk * Traits::chunk, Traits::chunk), Traits::tokens);
  }
};

}  // namespace zamba::kernel
