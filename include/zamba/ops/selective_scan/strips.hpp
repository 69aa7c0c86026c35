// SPDX-License-Identifier: MIT
// What both passes of selective_scan on the CPU share: how channels are shared out among tasks, and the loads and
// stores of a register of them. The equations are in ops/selective_scan.hpp.
#pragma once

#include <algorithm>

#include <zamba/kernel/simd.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// A strip is as many neighbouring channels of a head as a register holds; its state is N registers. A tile is a task's
/// strips, wide enough to use what each page of memory brings. Rows are worked through in chunks of Chunk positions.
template <class T, Index Chunk>
struct ScanStrips {
  static constexpr Index chunk = Chunk, tile_channels = 64, max_strips = tile_channels / lanes<T>;

  /// `width` neighbouring channels of one head, at most a register of them.
  struct Strip {
    Index head, channel, width;
  };

  /// Up to tile_channels neighbouring channels of one head.
  struct Tile {
    Index head, channel, width, count;  // count: of strips
    Strip operator[](Index i) const { return {head, channel + i * lanes<T>, std::min(lanes<T>, width - i * lanes<T>)}; }
  };

  struct Tiles {
    Index heads, P, N, per_head;

    template <class Inputs>
    explicit Tiles(const Inputs& in)
        : heads(in.B.shape[1]), P(in.u.cols() / heads), N(in.B.shape[2]), per_head(ceil_div(P, tile_channels)) {}

    Index count() const { return heads * per_head; }
    Tile operator[](Index i) const {
      const Index head = i / per_head, offset = i % per_head * tile_channels,
                  width = std::min(tile_channels, P - offset);
      return {head, head * P + offset, width, ceil_div(width, lanes<T>)};
    }
  };

  static Pack<T> load(const T* from) { return kernel::load(from); }
  static Pack<T> load(Matrix<const T> from, Index row, Strip strip) {
    return kernel::load<T>(&from(row, strip.channel), strip.width);
  }
  static Pack<T> load(Vector<const T> from, Strip strip) {
    return kernel::load<T>(from.data + strip.channel, strip.width);
  }
  static void store(Matrix<T> to, Index row, Strip strip, const Pack<T>& pack) {
    kernel::store(&to(row, strip.channel), pack, strip.width);
  }

  /// a = -exp(A_log) log2(e) of a strip, (N, lanes): the decay is 2^(dt a).
  template <class Inputs>
  static void load_decay(const Inputs& in, Strip strip, Index N, T* a) {
    if (strip.width < lanes<T>) std::fill_n(a, N * lanes<T>, T(0));
    for (Index c = 0; c < strip.width; ++c) {
      const T* from = &in.A_log(strip.channel + c, 0);
      for (Index n = 0; n < N; ++n) a[n * lanes<T> + c] = from[n];
    }
    for (Index n = 0; n < N; ++n)
      kernel::store(a + n * lanes<T>, Pack<T>(exp<T>(load(a + n * lanes<T>)) * T(-1.44269504088896340736)));
  }

  /// A row's state of a strip, (N, lanes); zeros where there is none.
  static void load_state(Tensor<const T, 3> state, Index row, Strip strip, Index N, T* s) {
    for (Index n = 0; n < N; ++n) kernel::store(s + n * lanes<T>, state ? load(state[row], n, strip) : zeros<T>());
  }
  static void store_state(Matrix<T> state, Strip strip, Index N, const T* s) {
    for (Index n = 0; n < N; ++n) store(state, n, strip, load(s + n * lanes<T>));
  }

  /// dt = softplus(delta + bias) and u of a chunk, (strips, chunk, lanes). Asks for what is read after: rows lie
  /// further apart than the processor looks ahead by itself.
  template <class Inputs>
  static void load_chunk(const Inputs& in, const Tile& strips, Index first, Index count, T* dt, T* u) {
    for (Index t = 0; t < count; ++t) {
      const Index bytes = strips.width * static_cast<Index>(sizeof(T));
      prefetch(&in.z(first + t, strips.channel), bytes);
      const Index next = std::min(first + t + chunk, in.u.rows() - 1);
      prefetch(&in.delta(next, strips.channel), bytes);
      prefetch(&in.u(next, strips.channel), bytes);
      for (Index i = 0; i < strips.count; ++i) {
        const Index at = (i * chunk + t) * lanes<T>;
        kernel::store(dt + at, softplus<T>(load(in.delta, first + t, strips[i]) + load(in.delta_bias, strips[i])));
        kernel::store(u + at, load(in.u, first + t, strips[i]));
      }
    }
  }
};

}  // namespace zamba::kernel
