// SPDX-License-Identifier: MIT
// selective_scan: the recurrence of Mamba, with softplus, skip and gate.
//
//   dt_t = softplus(delta_t + delta_bias)                        per channel
//   s_t  = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t                  A = -exp(A_log); per channel and state n
//   y_t  = ( sum_n C_t[n] s_t[n] + D u_t ) * silu(z_t)
//
// Source: Mamba (arXiv 2312.00752) algorithm 2; with H heads, each of P = D / H consecutive channels, and B, C of each
// head: Zamba (arXiv 2405.16712).
//
// Kept for the backward pass: the state at the start of every `scan_chunk` positions of a row ("checkpoints"); the rest
// is computed again from them, chunk by chunk.
//
// Numeric contract: everything in compute_t (float, or double for double); exp within 2e-7 relative in float. Sums over
// n run in order, sums over the channels of a head in fixed groups: results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/detail/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// What a scan reads. A: type of activations; F: type of the precise parameters.
template <class A, class F>
struct SelectiveScanInputs {
  Matrix<const A> u;           // (tokens, D) after the convolution
  Matrix<const A> delta;       // (tokens, D) before bias and softplus
  Matrix<const A> z;           // (tokens, D) before silu
  Tensor<const A, 3> B;        // (tokens, H, N)
  Tensor<const A, 3> C;        // (tokens, H, N)
  Matrix<const F> A_log;       // (D, N)
  Vector<const F> D;           // (D)
  Vector<const F> delta_bias;  // (D)
};

/// The gradients of SelectiveScanInputs: activations are assigned, parameters added to.
template <class A, class F>
struct SelectiveScanGradients {
  Matrix<A> u, delta, z;
  Tensor<A, 3> B, C;
  Matrix<F> A_log;
  Vector<F> D, delta_bias;
};

/// Positions between two kept states.
inline constexpr Index scan_chunk = 64;

/// How many states a batch keeps at most; row r's chunk k is kept at offsets[r] / scan_chunk + r + k.
constexpr Index scan_checkpoint_count(const Sequences& sequences) {
  return sequences.tokens / scan_chunk + sequences.rows;
}

ZAMBA_DECLARE_OPERATOR(SelectiveScan, "selective_scan.cuh");

/// y (tokens, D). state (rows, N, D), optional: read where the row has a past, rewritten with the row's last state.
/// checkpoints (scan_checkpoint_count, N, D), optional: kept for selective_scan_backward.
template <class Device, class A, class F = compute_t<A>>
void selective_scan(Context<Device>& ctx, const std::type_identity_t<SelectiveScanInputs<A, F>>& in,
                    const Sequences& sequences, std::type_identity_t<Tensor<F, 3>> state, Matrix<A> y,
                    std::type_identity_t<Tensor<F, 3>> checkpoints = {}) {
  SelectiveScan<Device>::template forward<A, F>(ctx, in, sequences, state, y, checkpoints);
}

/// d_state (rows, N, D), optional; in: the gradient of the final state, out: that of the initial state.
template <class Device, class A, class F>
void selective_scan_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_y,
                             const std::type_identity_t<SelectiveScanInputs<A, F>>& in, const Sequences& sequences,
                             std::type_identity_t<Tensor<const F, 3>> checkpoints,
                             const SelectiveScanGradients<A, F>& gradients,
                             std::type_identity_t<Tensor<F, 3>> d_state = {}) {
  SelectiveScan<Device>::backward(ctx, d_y, in, sequences, checkpoints, gradients, d_state);
}

template <>
struct SelectiveScan<cpu> {
  /// Vectorised over channels: one register holds `lanes` neighbouring channels of a head, the state of a tile is N
  /// registers. Works through a row in chunks, so that the loads of a chunk, a cache line each, overlap instead of
  /// waiting for the recurrence.
  template <class T, class F>
  static void forward(Context<cpu>& ctx, const SelectiveScanInputs<T, F>& in, const Sequences& sequences,
                      Tensor<F, 3> state, Matrix<T> y, Tensor<F, 3> checkpoints) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Tiles<T> tiles(in);
    ArenaScope scope(ctx.arena());
    const Index N = tiles.N;
    auto scratch = ctx.arena().tensor<T>(Index{ctx.threads()}, (2 * N + 2 * scan_chunk) * lanes<T>);
    ctx.parallel_for(sequences.rows * tiles.count(), [&](Index task, int worker) {
      const Index row = task / tiles.count();
      const Tile tile = tiles[task % tiles.count()];
      T* a = scratch[worker].data;        // (N, lanes)
      T* s = a + N * lanes<T>;            // (N, lanes)
      T* dt = s + N * lanes<T>;           // (scan_chunk, lanes)
      T* u = dt + scan_chunk * lanes<T>;  // (scan_chunk, lanes)
      load_decay(in, tile, N, a);
      load_state(state, sequences, row, tile, N, s);
      const detail::Pack<T> skip = detail::load(in.D.data + tile.channel, tile.width);
      const Index end = sequences.offsets[row + 1];
      Index chunk = sequences.offsets[row] / scan_chunk + row;
      for (Index first = sequences.offsets[row]; first < end; first += scan_chunk, ++chunk) {
        if (checkpoints) store_state(checkpoints[chunk], tile, N, s);
        const Index count = std::min(scan_chunk, end - first);
        load_chunk(in, tile, first, count, dt, u);
        for (Index t = 0; t < count; ++t) {
          const T* B = &in.B(first + t, tile.head, 0);
          const T* C = &in.C(first + t, tile.head, 0);
          const detail::Pack<T> dt_t = detail::load(dt + t * lanes<T>);
          const detail::Pack<T> u_t = detail::load(u + t * lanes<T>);
          const detail::Pack<T> dt_u = dt_t * u_t;
          detail::Pack<T> sum = skip * u_t;
          for (Index n = 0; n < N; ++n) {
            const detail::Pack<T> decay = detail::exp<T>(dt_t * detail::load(a + n * lanes<T>));
            const detail::Pack<T> s_t = decay * detail::load(s + n * lanes<T>) + dt_u * B[n];
            detail::store(s + n * lanes<T>, s_t);
            sum += s_t * C[n];
          }
          const detail::Pack<T> z = detail::load(&in.z(first + t, tile.channel), tile.width);
          detail::store(&y(first + t, tile.channel), detail::Pack<T>(sum * z * detail::sigmoid<T>(z)), tile.width);
        }
      }
      if (state && sequences.length(row) > 0) store_state(state[row], tile, N, s);
    });
  }

  /// Per chunk, last to first: the states are computed again and kept, then the adjoint state g runs backwards.
  ///   g_t = dL/ds_t = C_t dyp_t + exp(dt_{t+1} A) g_{t+1},   dyp = dy * silu(z)
  ///   dB_t = sum_channels g_t dt_t u_t,   dC_t = sum_channels dyp_t s_t
  ///   d dt_t = sum_n g_t (A exp(dt_t A) s_{t-1} + B_t u_t),   dA = sum_t g_t dt_t exp(dt_t A) s_{t-1}
  /// One task owns a group of tiles of a head over all rows, so parameter gradients have one writer.
  template <class T, class F>
  static void backward(Context<cpu>& ctx, Matrix<const T> d_y, const SelectiveScanInputs<T, F>& in,
                       const Sequences& sequences, Tensor<const F, 3> checkpoints,
                       const SelectiveScanGradients<T, F>& out, Tensor<F, 3> d_state) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Tiles<T> tiles(in);
    ArenaScope scope(ctx.arena());
    const Index N = tiles.N, groups = (tiles.per_head + group_tiles - 1) / group_tiles;
    auto partial =
        ctx.arena().tensor<T>(tiles.heads * groups, sequences.tokens, 2 * N);  // each group's share of dB, dC
    auto scratch = ctx.arena().tensor<T>(Index{ctx.threads()}, BackwardScratch<T>::size(N));
    ctx.parallel_for(tiles.heads * groups, [&](Index task, int worker) {
      const Index head = task / groups, first_tile = task % groups * group_tiles;
      const Index tile_count = std::min(group_tiles, tiles.per_head - first_tile);
      BackwardScratch<T> scratch_of(scratch[worker].data, N);
      std::fill_n(scratch_of.d_a, group_tiles * N * lanes<T>, T(0));
      detail::Pack<T> d_skip[group_tiles] = {}, d_bias[group_tiles] = {};
      for (Index row = 0; row < sequences.rows; ++row) {
        const Index begin = sequences.offsets[row], length = sequences.length(row);
        if (length == 0) continue;
        for (Index i = 0; i < tile_count; ++i)
          load_state(d_state, Tile(tiles[head * tiles.per_head + first_tile + i]), row, N,
                     scratch_of.adjoint + i * N * lanes<T>);
        for (Index k = (length - 1) / scan_chunk; k >= 0; --k) {
          const Index first = begin + k * scan_chunk, count = std::min(scan_chunk, length - k * scan_chunk);
          std::fill_n(scratch_of.d_B, 2 * scan_chunk * N * lanes<T>, T(0));
          for (Index i = 0; i < tile_count; ++i)
            backward_chunk(in, d_y, tiles[head * tiles.per_head + first_tile + i], first, count,
                           checkpoints[begin / scan_chunk + row + k], out, scratch_of, i, d_skip[i], d_bias[i]);
          for (Index t = 0; t < count; ++t)
            for (Index n = 0; n < N; ++n) {
              const Index at = (t * N + n) * lanes<T>;
              partial(task, first + t, n) = detail::sum<T>(detail::load(scratch_of.d_B + at));
              partial(task, first + t, N + n) = detail::sum<T>(detail::load(scratch_of.d_C + at));
            }
        }
        if (d_state)
          for (Index i = 0; i < tile_count; ++i) {
            // A row that began from zero has no initial state to receive a gradient.
            T* adjoint = scratch_of.adjoint + i * N * lanes<T>;
            if (sequences.start(row) == 0) std::fill_n(adjoint, N * lanes<T>, T(0));
            store_state(d_state[row], tiles[head * tiles.per_head + first_tile + i], N, adjoint);
          }
      }
      for (Index i = 0; i < tile_count; ++i)
        add_parameter_gradients(in, tiles[head * tiles.per_head + first_tile + i], N, scratch_of.d_a + i * N * lanes<T>,
                                d_skip[i], d_bias[i], out);
    });
    ctx.parallel_for(sequences.tokens, [&](Index token, int) {
      for (Index head = 0; head < tiles.heads; ++head)
        for (Index n = 0; n < N; ++n) {
          T d_B = 0, d_C = 0;
          for (Index group = 0; group < groups; ++group) {
            d_B += partial(head * groups + group, token, n);
            d_C += partial(head * groups + group, token, N + n);
          }
          out.B(token, head, n) = d_B;
          out.C(token, head, n) = d_C;
        }
    });
  }

 private:
  template <class T>
  static constexpr Index lanes = detail::lanes<T>;
  /// Tiles whose shares of dB and dC are added lane by lane before the sum over lanes.
  static constexpr Index group_tiles = 8;

  /// `width` neighbouring channels of one head, at most one register of them.
  struct Tile {
    Index head, channel, width;
  };

  template <class T>
  struct Tiles {
    Index heads, P, N, per_head;

    template <class F>
    explicit Tiles(const SelectiveScanInputs<T, F>& in)
        : heads(in.B.shape[1]), P(in.u.cols() / heads), N(in.B.shape[2]), per_head((P + lanes<T> - 1) / lanes<T>) {}

    Index count() const { return heads * per_head; }
    Tile operator[](Index i) const {
      const Index head = i / per_head, offset = i % per_head * lanes<T>;
      return {head, head * P + offset, std::min(lanes<T>, P - offset)};
    }
  };

  template <class T>
  struct BackwardScratch {
    T *a, *states, *decays, *d_B, *d_C, *adjoint, *d_a, *dt, *u;

    static Index size(Index N) {
      return (N + (4 * scan_chunk + 1) * N + 2 * group_tiles * N + 2 * scan_chunk) * lanes<T>;
    }
    BackwardScratch(T* memory, Index N)
        : a(memory),                                         // (N, lanes)
          states(a + N * lanes<T>),                          // (1 + scan_chunk, N, lanes): s_{t-1} at t
          decays(states + (scan_chunk + 1) * N * lanes<T>),  // (scan_chunk, N, lanes)
          d_B(decays + scan_chunk * N * lanes<T>),           // (scan_chunk, N, lanes)
          d_C(d_B + scan_chunk * N * lanes<T>),              // (scan_chunk, N, lanes)
          adjoint(d_C + scan_chunk * N * lanes<T>),          // (group_tiles, N, lanes)
          d_a(adjoint + group_tiles * N * lanes<T>),         // (group_tiles, N, lanes)
          dt(d_a + group_tiles * N * lanes<T>),              // (scan_chunk, lanes)
          u(dt + scan_chunk * lanes<T>) {}                   // (scan_chunk, lanes)
  };

  /// a = -exp(A_log) of a tile, (N, lanes).
  template <class T, class F>
  static void load_decay(const SelectiveScanInputs<T, F>& in, Tile tile, Index N, T* a) {
    for (Index n = 0; n < N; ++n) {
      T column[lanes<T>] = {};
      for (Index c = 0; c < tile.width; ++c) column[c] = in.A_log(tile.channel + c, n);
      detail::store(a + n * lanes<T>, detail::Pack<T>(-detail::exp<T>(detail::load(column))));
    }
  }

  /// The row's initial state of a tile, or zero where the row has no past.
  template <class T>
  static void load_state(Tensor<T, 3> state, const Sequences& sequences, Index row, Tile tile, Index N, T* s) {
    load_state(sequences.start(row) > 0 ? state : Tensor<T, 3>{}, tile, row, N, s);
  }
  template <class T>
  static void load_state(Tensor<T, 3> state, Tile tile, Index row, Index N, T* s) {
    for (Index n = 0; n < N; ++n)
      detail::store(s + n * lanes<T>,
                    state ? detail::load<T>(&state(row, n, tile.channel), tile.width) : detail::Pack<T>{});
  }
  template <class T>
  static void store_state(Matrix<T> state, Tile tile, Index N, const T* s) {
    for (Index n = 0; n < N; ++n) detail::store(&state(n, tile.channel), detail::load(s + n * lanes<T>), tile.width);
  }

  /// dt = softplus(delta + bias) and u of a chunk, (count, lanes).
  template <class T, class F>
  static void load_chunk(const SelectiveScanInputs<T, F>& in, Tile tile, Index first, Index count, T* dt, T* u) {
    const detail::Pack<T> bias = detail::load(in.delta_bias.data + tile.channel, tile.width);
    for (Index t = 0; t < count; ++t) {
      const detail::Pack<T> delta = detail::load(&in.delta(first + t, tile.channel), tile.width);
      detail::store(dt + t * lanes<T>, detail::softplus<T>(delta + bias));
      detail::store(u + t * lanes<T>, detail::load(&in.u(first + t, tile.channel), tile.width));
    }
  }

  template <class T, class F>
  static void backward_chunk(const SelectiveScanInputs<T, F>& in, Matrix<const T> d_y, Tile tile, Index first,
                             Index count, Matrix<const F> checkpoint, const SelectiveScanGradients<T, F>& out,
                             const BackwardScratch<T>& at, Index i, detail::Pack<T>& d_skip, detail::Pack<T>& d_bias) {
    using Pack = detail::Pack<T>;
    const Index N = checkpoint.rows(), step = N * lanes<T>;
    load_decay(in, tile, N, at.a);
    load_chunk(in, tile, first, count, at.dt, at.u);
    for (Index n = 0; n < N; ++n)
      detail::store(at.states + n * lanes<T>, detail::load<T>(&checkpoint(n, tile.channel), tile.width));
    const Pack skip = detail::load(in.D.data + tile.channel, tile.width);
    const Pack bias = detail::load(in.delta_bias.data + tile.channel, tile.width);

    for (Index t = 0; t < count; ++t) {  // states again, and the gradient of z
      const T* B = &in.B(first + t, tile.head, 0);
      const T* C = &in.C(first + t, tile.head, 0);
      const Pack dt = detail::load(at.dt + t * lanes<T>), u = detail::load(at.u + t * lanes<T>);
      Pack sum = skip * u;
      for (Index n = 0; n < N; ++n) {
        const Index k = t * step + n * lanes<T>;
        const Pack decay = detail::exp<T>(dt * detail::load(at.a + n * lanes<T>));
        const Pack s = decay * detail::load(at.states + k) + dt * u * B[n];
        detail::store(at.decays + k, decay);
        detail::store(at.states + k + step, s);
        sum += s * C[n];
      }
      const Pack z = detail::load(&in.z(first + t, tile.channel), tile.width);
      const Pack gate = detail::sigmoid<T>(z), dy = detail::load(&d_y(first + t, tile.channel), tile.width);
      detail::store(&out.z(first + t, tile.channel), Pack(dy * sum * gate * (T(1) + z * (T(1) - gate))), tile.width);
    }

    T* adjoint = at.adjoint + i * step;
    T* d_a = at.d_a + i * step;
    for (Index t = count - 1; t >= 0; --t) {
      const T* B = &in.B(first + t, tile.head, 0);
      const T* C = &in.C(first + t, tile.head, 0);
      const Pack dt = detail::load(at.dt + t * lanes<T>), u = detail::load(at.u + t * lanes<T>);
      const Pack z = detail::load(&in.z(first + t, tile.channel), tile.width);
      const Pack d_sum = detail::load(&d_y(first + t, tile.channel), tile.width) * z * detail::sigmoid<T>(z);
      const Pack dt_u = dt * u;
      Pack g_B = {}, d_dt = {};
      for (Index n = 0; n < N; ++n) {
        const Index k = t * step + n * lanes<T>;
        const Pack g = detail::load(adjoint + n * lanes<T>) + d_sum * C[n];
        detail::store(at.d_C + k, Pack(detail::load(at.d_C + k) + d_sum * detail::load(at.states + k + step)));
        detail::store(at.d_B + k, Pack(detail::load(at.d_B + k) + g * dt_u));
        g_B += g * B[n];
        const Pack carried = g * detail::load(at.decays + k);
        const Pack through_decay = carried * detail::load(at.states + k);
        d_dt += through_decay * detail::load(at.a + n * lanes<T>);
        detail::store(d_a + n * lanes<T>, Pack(detail::load(d_a + n * lanes<T>) + through_decay * dt));
        detail::store(adjoint + n * lanes<T>, carried);
      }
      d_dt += g_B * u;
      const Pack delta = detail::load(&in.delta(first + t, tile.channel), tile.width) + bias;
      const Pack d_delta = d_dt * (delta > T(20) ? Pack{} + T(1) : detail::sigmoid<T>(delta));
      detail::store(&out.delta(first + t, tile.channel), d_delta, tile.width);
      detail::store(&out.u(first + t, tile.channel), Pack(g_B * dt + d_sum * skip), tile.width);
      d_skip += d_sum * u;
      d_bias += d_delta;
    }
  }

  /// dA/dA_log = A.
  template <class T, class F>
  static void add_parameter_gradients(const SelectiveScanInputs<T, F>& in, Tile tile, Index N, const T* d_a,
                                      const detail::Pack<T>& d_skip, const detail::Pack<T>& d_bias,
                                      const SelectiveScanGradients<T, F>& out) {
    for (Index c = 0; c < tile.width; ++c) {
      const Index channel = tile.channel + c;
      for (Index n = 0; n < N; ++n) out.A_log(channel, n) -= d_a[n * lanes<T> + c] * std::exp(in.A_log(channel, n));
      out.D[channel] += d_skip[c];
      out.delta_bias[channel] += d_bias[c];
    }
  }
};

}  // namespace zamba
