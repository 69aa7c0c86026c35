// SPDX-License-Identifier: MIT
// What producers and consumers of backward.cuh hand to each other in shared memory.
#pragma once

#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/selective_scan/channel_sums.cuh>
#include <zamba/ops/selective_scan/step.cuh>
#include <zamba/ops/selective_scan/strips.hpp>

namespace zamba::kernel {

/// A backward scan in float, by blocks of so many channels. Wide_: all rows of activations begin at multiples of four
/// elements, and heads and states come in fours.
template <class A_, int Channels_, bool Wide_>
struct ScanBackwardTraits {
  using A = A_;
  static constexpr bool wide = Wide_;
  static constexpr bool exact = sizeof(A) > 2;  // whether dB and dC are summed with all bits of a float
  static constexpr int slices = 4, states = 4, most_states = slices * states;
  static constexpr int channels = Channels_, pairs = channels / 2, quads = channels / 4;
  static constexpr int tokens = 8;                          // of a stage
  static constexpr int group = 4, groups = tokens / group;  // of a stage: tokens of which a consumer has all states
  static constexpr int consumers = pairs * slices, producers = quads * tokens;   // threads
  static constexpr int threads = consumers + producers, blocks = 64 / channels;  // of a multiprocessor, at least
  static constexpr int chunk = static_cast<int>(scan_chunk), stages = chunk / tokens, starts = chunk / group;
  static constexpr int slots = stages + 2;                      // stages whose steps are in shared memory
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
    float d_y[channels];                        // d y silu(z)
    float d_z[channels];                        // d y silu'(z)
    float sums[sums_count][slices * channels];  // sum_place(): of a slice
    float4 parts[Traits::parts][2 * slices];    // part_place(): of dB, then of dC
    float4 unused[5];                           // so that tokens are 16 bytes from each other
  };
  static_assert(sizeof(Output) % 128 == 16, "zamba: parts of four tokens are written to different banks");

  Token tokens[Traits::slots][Traits::tokens];
  Output outputs[2][Traits::tokens];                    // of two stages in turn, called buffers
  float4 starts[Traits::starts][2][Traits::consumers];  // start_place(): states where groups begin, of each channel

  /// Even pairs of channels, B, odd pairs.
  __device__ static int step_place(int pair) { return pair % 2 * B_place(slices) + pair / 2; }
  __device__ static int B_place(int slice) { return Traits::pairs / 2 + slice; }
  __device__ static int sum_place(int channel, int slice) {
    return slice * channels + (channel + slice % 2 * 16) % channels;
  }
  __device__ static int part_place(int quad, int part) { return quad ^ part % 2 * 4; }
  /// Chunks take turns: while the starts of one are read from the last to the first, those of the chunk before it, from
  /// the first to the last, are written in their places.
  __device__ static int start_place(int turn, int group) { return turn % 2 ? Traits::starts - 1 - group : group; }
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

/// Which of the ten slots in shared memory has the steps of a stage. Stages are prepared in the order in which they are
/// scanned, the first ten at once, each further one where the next in the order of adjoints was. Four bits a slot.
template <class Traits>
class ScanSlots {
 public:
  /// stages: of the row's last chunk.
  __device__ explicit ScanSlots(int stages) : later_(0x9876543210 >> 4 * stages), count_(Traits::slots - stages) {}

  /// Of a stage of the chunk whose adjoints are computed, and of the chunk before it.
  __device__ int now(int stage) const { return now_ >> 4 * stage & 15; }
  __device__ int next(int stage) const { return static_cast<int>(later_ >> 4 * stage) & 15; }
  /// The stage gives its slot to the next in line.
  __device__ void pass_on(int stage) { later_ |= static_cast<unsigned long long>(now(stage)) << 4 * count_++; }
  __device__ void next_chunk() {
    now_ = static_cast<unsigned>(later_);
    later_ >>= 4 * Traits::stages;
    count_ -= Traits::stages;
  }

 private:
  unsigned now_ = 0x76543210;
  unsigned long long later_;
  int count_;
};

}  // namespace zamba::kernel
