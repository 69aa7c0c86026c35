// SPDX-License-Identifier: MIT
// The backward pass of selective_scan on the CPU; equations of the forward pass in ops/selective_scan.hpp.
//
// Per chunk, last to first: the states are computed again and kept, then the adjoint state g runs backwards.
//   g_t = dL/ds_t = C_t dyp_t + exp(dt_{t+1} A) g_{t+1},   dyp = dy * silu(z)
//   dB_t = sum_channels g_t dt_t u_t,   dC_t = sum_channels dyp_t s_t
//   d dt_t = sum_n g_t (A exp(dt_t A) s_{t-1} + B_t u_t),   dA = sum_t g_t dt_t exp(dt_t A) s_{t-1}
// A task owns a tile over all rows, so parameter gradients have one writer.
#pragma once

#include <algorithm>
#include <cmath>

#include <zamba/context.hpp>
#include <zamba/kernel/add_parts.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/ops/selective_scan/strips.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

template <class T, Index Chunk>
class ScanBackward : ScanStrips<T, Chunk> {
  using Strips = ScanStrips<T, Chunk>;
  using Strips::chunk, Strips::tile_channels, Strips::max_strips;
  using Strips::load, Strips::store, Strips::load_decay, Strips::load_state, Strips::store_state, Strips::load_chunk;
  using typename Strips::Strip, typename Strips::Tile, typename Strips::Tiles;

 public:
  struct Room {
    Tensor<T, 3> partial;  // (tiles, tokens, 2 N): each tile's share of dB and dC
    Matrix<T> memory;      // (threads, ...)

    template <class Ctx, class Inputs>
    Room(Ctx& ctx, const Inputs& in, Index tokens)
        : partial(ctx.arena().template tensor<T>(Tiles(in).count(), tokens, 2 * Tiles(in).N)),
          memory(ctx.arena().template tensor<T>(Index{ctx.threads()}, Scratch::size(Tiles(in).N))) {}
  };

  /// Assigns and adds to `out` as selective_scan_backward says.
  template <class Inputs, class Gradients>
  static void run(Context<cpu>& ctx, Matrix<const T> d_y, const Inputs& in, const Sequences& sequences,
                  Tensor<const T, 3> checkpoints, const Gradients& out, Tensor<T, 3> d_state) {
    const Tiles tiles(in);
    const Index N = tiles.N;
    ArenaScope scope(ctx.arena());
    const Room room(ctx, in, sequences.tokens);
    const auto& [partial, memory] = room;
    ctx.parallel_for(tiles.count(), [&, partial = partial, memory = memory](Index task, int worker) {
      const Tile strips = tiles[task];
      const Scratch scratch(memory[worker].data, N);
      std::fill_n(scratch.d_a, N * tile_channels, T(0));
      Pack<T> d_skip[max_strips] = {}, d_bias[max_strips] = {};
      for (Index row = 0; row < sequences.rows; ++row) {
        const Index begin = sequences.offsets[row], length = sequences.length(row);
        if (length == 0) continue;
        for (Index i = 0; i < strips.count; ++i)
          load_state(d_state, row, strips[i], N, scratch.adjoint + i * N * lanes<T>);
        for (Index k = (length - 1) / chunk; k >= 0; --k) {
          const Index first = begin + k * chunk, count = std::min(chunk, length - k * chunk);
          through_chunk(in, d_y, strips, first, count, checkpoints[begin / chunk + row + k], out, scratch, d_skip,
                        d_bias, partial[task].slice(first, count));
        }
        if (!d_state) continue;
        // A row that began from zero has no initial state to receive a gradient.
        if (sequences.start(row) == 0) std::fill_n(scratch.adjoint, N * tile_channels, T(0));
        for (Index i = 0; i < strips.count; ++i)
          store_state(d_state[row], strips[i], N, scratch.adjoint + i * N * lanes<T>);
      }
      for (Index i = 0; i < strips.count; ++i)
        add_parameter_gradients(in, strips[i], N, scratch.d_a + i * N * lanes<T>, d_skip[i], d_bias[i], out);
    });
    add_parts(ctx, tiles.per_head, partial, out.B, out.C);  // of a head, those of its tiles
  }

 private:
  /// Memory of one backward task; strip(i) is the part of strip i.
  struct Scratch {
    T *a, *states, *decays, *d_B, *d_C, *adjoint, *d_a, *dt, *u;

    static Index size(Index N) { return (N + (4 * chunk + 1) * N) * lanes<T> + 2 * (N + chunk) * tile_channels; }
    Scratch(T* memory, Index N)
        : a(memory),                                    // (N, lanes)
          states(a + N * lanes<T>),                     // (1 + chunk, N, lanes): s_{t-1} at t
          decays(states + (chunk + 1) * N * lanes<T>),  // (chunk, N, lanes)
          d_B(decays + chunk * N * lanes<T>),           // (chunk, N, lanes), summed over strips
          d_C(d_B + chunk * N * lanes<T>),              // (chunk, N, lanes), summed over strips
          adjoint(d_C + chunk * N * lanes<T>),          // (strips, N, lanes)
          d_a(adjoint + N * tile_channels),             // (strips, N, lanes)
          dt(d_a + N * tile_channels),                  // (strips, chunk, lanes)
          u(dt + chunk * tile_channels) {}              // (strips, chunk, lanes)
    Scratch strip(Index i, Index N) const {
      Scratch part = *this;
      part.adjoint += i * N * lanes<T>;
      part.d_a += i * N * lanes<T>;
      part.dt += i * chunk * lanes<T>;
      part.u += i * chunk * lanes<T>;
      return part;
    }
  };

  /// All strips of a tile through a chunk; partial (count, 2 N) becomes the tile's share of dB and dC.
  template <class Inputs, class Gradients>
  static void through_chunk(const Inputs& in, Matrix<const T> d_y, const Tile& strips, Index first, Index count,
                            Matrix<const T> checkpoint, const Gradients& out, const Scratch& scratch, Pack<T>* d_skip,
                            Pack<T>* d_bias, Matrix<T> partial) {
    const Index N = checkpoint.rows();
    load_chunk(in, strips, first, count, scratch.dt, scratch.u);
    std::fill_n(scratch.d_B, 2 * chunk * N * lanes<T>, T(0));
    for (Index i = 0; i < strips.count; ++i) {
      const Scratch at = scratch.strip(i, N);
      scan_again(in, d_y, strips[i], first, count, checkpoint, out, at);
      adjoint_scan(in, d_y, strips[i], first, count, N, out, at, d_skip[i], d_bias[i]);
    }
    for (Index t = 0; t < count; ++t)
      for (Index n = 0; n < N; ++n) {
        partial(t, n) = sum<T>(load(scratch.d_B + (t * N + n) * lanes<T>));
        partial(t, N + n) = sum<T>(load(scratch.d_C + (t * N + n) * lanes<T>));
      }
  }

  /// The states of a strip through a chunk once more, kept with their decays, and the gradient of z.
  template <class Inputs, class Gradients>
  static void scan_again(const Inputs& in, Matrix<const T> d_y, Strip strip, Index first, Index count,
                         Matrix<const T> checkpoint, const Gradients& out, const Scratch& at) {
    const Index N = checkpoint.rows(), step = N * lanes<T>;
    load_decay(in, strip, N, at.a);
    for (Index n = 0; n < N; ++n) kernel::store(at.states + n * lanes<T>, load(checkpoint, n, strip));
    const Pack<T> skip = load(in.D, strip);
    for (Index t = 0; t < count; ++t) {
      const T* B = &in.B(first + t, strip.head, 0);
      const T* C = &in.C(first + t, strip.head, 0);
      const Pack<T> dt = load(at.dt + t * lanes<T>), u = load(at.u + t * lanes<T>), dt_u = dt * u;
      Pack<T> sum = skip * u;
      for (Index n = 0; n < N; ++n) {
        const Index k = t * step + n * lanes<T>;
        const Pack<T> decay = kernel::exp2_of_negative<T>(dt * load(at.a + n * lanes<T>));
        const Pack<T> s = decay * load(at.states + k) + dt_u * B[n];
        kernel::store(at.decays + k, decay);
        kernel::store(at.states + k + step, s);
        sum += s * C[n];
      }
      const Pack<T> z = load(in.z, first + t, strip), gate = kernel::sigmoid<T>(z), dy = load(d_y, first + t, strip);
      store(out.z, first + t, strip, Pack<T>(dy * sum * gate * (T(1) + z * (T(1) - gate))));
    }
  }

  /// The adjoint state backwards through the chunk, and the gradients that come from it.
  template <class Inputs, class Gradients>
  static void adjoint_scan(const Inputs& in, Matrix<const T> d_y, Strip strip, Index first, Index count, Index N,
                           const Gradients& out, const Scratch& at, Pack<T>& d_skip, Pack<T>& d_bias) {
    const Index step = N * lanes<T>;
    const Pack<T> skip = load(in.D, strip), bias = load(in.delta_bias, strip);
    for (Index t = count - 1; t >= 0; --t) {
      const T* B = &in.B(first + t, strip.head, 0);
      const T* C = &in.C(first + t, strip.head, 0);
      const Pack<T> dt = load(at.dt + t * lanes<T>), u = load(at.u + t * lanes<T>), dt_u = dt * u;
      const Pack<T> z = load(in.z, first + t, strip);
      const Pack<T> d_sum = load(d_y, first + t, strip) * z * kernel::sigmoid<T>(z);
      Pack<T> g_B = {}, d_dt = {};
      for (Index n = 0; n < N; ++n) {
        const Index k = t * step + n * lanes<T>;
        const Pack<T> g = load(at.adjoint + n * lanes<T>) + d_sum * C[n];
        kernel::store(at.d_C + k, Pack<T>(load(at.d_C + k) + d_sum * load(at.states + k + step)));
        kernel::store(at.d_B + k, Pack<T>(load(at.d_B + k) + g * dt_u));
        g_B += g * B[n];
        const Pack<T> carried = g * load(at.decays + k), through_decay = carried * load(at.states + k);
        d_dt += through_decay * load(at.a + n * lanes<T>);
        kernel::store(at.d_a + n * lanes<T>, Pack<T>(load(at.d_a + n * lanes<T>) + through_decay * dt));
        kernel::store(at.adjoint + n * lanes<T>, carried);
      }
      d_dt = d_dt * T(0.69314718055994530942) + g_B * u;  // a is A log2(e)
      const Pack<T> delta = load(in.delta, first + t, strip) + bias;
      const Pack<T> d_delta = d_dt * (delta > T(20) ? kernel::broadcast<T>(1) : kernel::sigmoid<T>(delta));
      store(out.delta, first + t, strip, d_delta);
      store(out.u, first + t, strip, Pack<T>(g_B * dt + d_sum * skip));
      d_skip += d_sum * u;
      d_bias += d_delta;
    }
  }

  /// dA/dA_log = A.
  template <class Inputs, class Gradients>
  static void add_parameter_gradients(const Inputs& in, Strip strip, Index N, const T* d_a, const Pack<T>& d_skip,
                                      const Pack<T>& d_bias, const Gradients& out) {
    for (Index c = 0; c < strip.width; ++c) {
      const Index channel = strip.channel + c;
      for (Index n = 0; n < N; ++n) out.A_log(channel, n) -= d_a[n * lanes<T> + c] * std::exp(in.A_log(channel, n));
      out.D[channel] += d_skip[c];
      out.delta_bias[channel] += d_bias[c];
    }
  }
};

}  // namespace zamba::kernel
