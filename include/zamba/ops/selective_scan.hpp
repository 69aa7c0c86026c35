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
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
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

namespace kernel {

template <class A, class F>
void check_inputs(const Door& door, const SelectiveScanInputs<A, F>& in, Index n) {
  const Index D = in.u.cols(), H = in.B.shape[1], N = in.B.shape[2];
  door.shape("u", in.u, n, D);
  door.shape("delta", in.delta, n, D);
  door.shape("B", in.B, n, H, N);
  door.shape("C", in.C, n, H, N);
  door.shape("z", in.z, n, D);
  door.shape("A_log", in.A_log, D, N);
  door.shape("D", in.D, D);
  door.shape("delta_bias", in.delta_bias, D);
}

}  // namespace kernel

/// y (tokens, D). state (rows, N, D), optional: read where the row has a past, rewritten with the row's last state.
/// checkpoints (scan_checkpoint_count, N, D), optional: kept for selective_scan_backward.
template <class Device, class A, class F = compute_t<A>>
void selective_scan(Context<Device>& ctx, const std::type_identity_t<SelectiveScanInputs<A, F>>& in,
                    const Sequences& sequences, std::type_identity_t<Tensor<F, 3>> state, Matrix<A> y,
                    std::type_identity_t<Tensor<F, 3>> checkpoints = {}) {
  if constexpr (checked) {
    const kernel::Door door{"selective_scan"};
    const Index n = sequences.tokens, D = in.u.cols(), N = in.B.shape[2];
    kernel::check_inputs(door, in, n);
    door.optional("state", state, sequences.rows, N, D);
    door.shape("y", y, n, D);
    door.optional("checkpoints", checkpoints, scan_checkpoint_count(sequences), N, D);
  }
  SelectiveScan<Device>::template forward<A, F>(ctx, in, sequences, state, y, checkpoints);
}

/// d_state (rows, N, D), optional; in: the gradient of the final state, out: that of the initial state.
template <class Device, class A, class F>
void selective_scan_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_y,
                             const std::type_identity_t<SelectiveScanInputs<A, F>>& in, const Sequences& sequences,
                             std::type_identity_t<Tensor<const F, 3>> checkpoints,
                             const SelectiveScanGradients<A, F>& gradients,
                             std::type_identity_t<Tensor<F, 3>> d_state = {}) {
  if constexpr (checked) {
    const kernel::Door door{"selective_scan_backward"};
    const Index n = sequences.tokens, D = in.u.cols(), H = in.B.shape[1], N = in.B.shape[2];
    kernel::check_inputs(door, in, n);
    door.shape("d_y", d_y, n, D);
    door.shape("checkpoints", checkpoints, scan_checkpoint_count(sequences), N, D);
    door.shape("gradient of u", gradients.u, n, D);
    door.shape("gradient of delta", gradients.delta, n, D);
    door.shape("gradient of B", gradients.B, n, H, N);
    door.shape("gradient of C", gradients.C, n, H, N);
    door.shape("gradient of z", gradients.z, n, D);
    door.shape("gradient of A_log", gradients.A_log, D, N);
    door.shape("gradient of D", gradients.D, D);
    door.shape("gradient of delta_bias", gradients.delta_bias, D);
    door.optional("d_state", d_state, sequences.rows, N, D);
  }
  SelectiveScan<Device>::backward(ctx, d_y, in, sequences, checkpoints, gradients, d_state);
}

/// Vectorised over channels. A strip is as many neighbouring channels of a head as a register holds; its state is N
/// registers. A task takes a tile of strips, wide enough to use what each page of memory brings, and goes through a row
/// in chunks, so that the loads of a chunk overlap instead of waiting for the recurrence.
template <>
struct SelectiveScan<cpu> {
  template <class T, class F>
  static void forward(Context<cpu>& ctx, const SelectiveScanInputs<T, F>& in, const Sequences& sequences,
                      Tensor<F, 3> state, Matrix<T> y, Tensor<F, 3> checkpoints) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Tiles<T> tiles(in);
    const Index N = tiles.N;
    ArenaScope scope(ctx.arena());
    const Matrix<T> memory = scratch(ctx, in, sequences, state, y, checkpoints);
    ctx.parallel_for(sequences.rows * tiles.count(), [&](Index task, int worker) {
      const Index row = task / tiles.count();
      const auto strips = tiles[task % tiles.count()];
      T* a = memory[worker].data;              // (strips, N, lanes)
      T* s = a + N * tile_channels;            // (strips, N, lanes)
      T* dt = s + N * tile_channels;           // (strips, scan_chunk, lanes); then the sums over n
      T* u = dt + scan_chunk * tile_channels;  // (strips, scan_chunk, lanes)
      const auto state_of = [&](T* states, Index i) { return states + i * N * lanes<T>; };
      const auto chunk_of = [&](T* values, Index i) { return values + i * scan_chunk * lanes<T>; };
      for (Index i = 0; i < strips.count; ++i) {
        load_decay(in, strips[i], N, state_of(a, i));
        load_state(sequences.start(row) > 0 ? state : Tensor<F, 3>{}, row, strips[i], N, state_of(s, i));
      }
      const Index end = sequences.offsets[row + 1];
      Index chunk = sequences.offsets[row] / scan_chunk + row;
      for (Index first = sequences.offsets[row]; first < end; first += scan_chunk, ++chunk) {
        const Index count = std::min(scan_chunk, end - first);
        load_chunk(in, strips, first, count, dt, u);
        for (Index i = 0; i < strips.count; ++i) {
          if (checkpoints) store_state(checkpoints[chunk], strips[i], N, state_of(s, i));
          scan(in, strips[i], first, count, N, state_of(a, i), state_of(s, i), chunk_of(dt, i), chunk_of(u, i));
        }
        for (Index t = 0; t < count; ++t)
          for (Index i = 0; i < strips.count; ++i) {
            const Pack<T> sum = load(chunk_of(dt, i) + t * lanes<T>), z = load(in.z, first + t, strips[i]);
            store(y, first + t, strips[i], Pack<T>(sum * z * kernel::sigmoid<T>(z)));
          }
      }
      if (state && sequences.length(row) > 0)
        for (Index i = 0; i < strips.count; ++i) store_state(state[row], strips[i], N, state_of(s, i));
    });
  }

  template <class Ctx, class T, class F>
  static Matrix<T> scratch(Ctx& ctx, const SelectiveScanInputs<T, F>& in, const Sequences&, Tensor<F, 3>, Matrix<T>,
                           Tensor<F, 3>) {
    return ctx.arena().template tensor<T>(Index{ctx.threads()}, 2 * (Tiles<T>(in).N + scan_chunk) * tile_channels);
  }

  /// Per chunk, last to first: the states are computed again and kept, then the adjoint state g runs backwards.
  ///   g_t = dL/ds_t = C_t dyp_t + exp(dt_{t+1} A) g_{t+1},   dyp = dy * silu(z)
  ///   dB_t = sum_channels g_t dt_t u_t,   dC_t = sum_channels dyp_t s_t
  ///   d dt_t = sum_n g_t (A exp(dt_t A) s_{t-1} + B_t u_t),   dA = sum_t g_t dt_t exp(dt_t A) s_{t-1}
  /// A task owns a tile over all rows, so parameter gradients have one writer.
  template <class T, class F>
  static void backward(Context<cpu>& ctx, Matrix<const T> d_y, const SelectiveScanInputs<T, F>& in,
                       const Sequences& sequences, Tensor<const F, 3> checkpoints,
                       const SelectiveScanGradients<T, F>& out, Tensor<F, 3> d_state) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Tiles<T> tiles(in);
    const Index N = tiles.N;
    ArenaScope scope(ctx.arena());
    auto partial = ctx.arena().tensor<T>(tiles.count(), sequences.tokens, 2 * N);  // each tile's share of dB and dC
    auto memory = ctx.arena().tensor<T>(Index{ctx.threads()}, Scratch<T>::size(N));
    ctx.parallel_for(tiles.count(), [&](Index task, int worker) {
      const auto strips = tiles[task];
      const Scratch<T> scratch(memory[worker].data, N);
      std::fill_n(scratch.d_a, N * tile_channels, T(0));
      Pack<T> d_skip[max_strips<T>] = {}, d_bias[max_strips<T>] = {};
      for (Index row = 0; row < sequences.rows; ++row) {
        const Index begin = sequences.offsets[row], length = sequences.length(row);
        if (length == 0) continue;
        for (Index i = 0; i < strips.count; ++i)
          load_state(d_state, row, strips[i], N, scratch.adjoint + i * N * lanes<T>);
        for (Index k = (length - 1) / scan_chunk; k >= 0; --k) {
          const Index first = begin + k * scan_chunk, count = std::min(scan_chunk, length - k * scan_chunk);
          load_chunk(in, strips, first, count, scratch.dt, scratch.u);
          std::fill_n(scratch.d_B, 2 * scan_chunk * N * lanes<T>, T(0));
          for (Index i = 0; i < strips.count; ++i)
            backward_chunk(in, d_y, strips[i], first, count, checkpoints[begin / scan_chunk + row + k], out,
                           scratch.strip(i, N), d_skip[i], d_bias[i]);
          for (Index t = 0; t < count; ++t)
            for (Index n = 0; n < N; ++n) {
              partial(task, first + t, n) = kernel::sum<T>(load(scratch.d_B + (t * N + n) * lanes<T>));
              partial(task, first + t, N + n) = kernel::sum<T>(load(scratch.d_C + (t * N + n) * lanes<T>));
            }
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
    ctx.parallel_for(sequences.tokens, [&](Index token, int) {
      for (Index head = 0; head < tiles.heads; ++head)
        for (Index n = 0; n < N; ++n) {
          T d_B = 0, d_C = 0;
          for (Index tile = head * tiles.per_head; tile < (head + 1) * tiles.per_head; ++tile) {
            d_B += partial(tile, token, n);
            d_C += partial(tile, token, N + n);
          }
          out.B(token, head, n) = d_B;
          out.C(token, head, n) = d_C;
        }
    });
  }

 private:
  template <class T>
  using Pack = kernel::Pack<T>;
  template <class T>
  static constexpr Index lanes = kernel::lanes<T>;
  static constexpr Index tile_channels = 64;
  template <class T>
  static constexpr Index max_strips = tile_channels / lanes<T>;

  /// `width` neighbouring channels of one head, at most a register of them.
  struct Strip {
    Index head, channel, width;
  };

  /// Up to tile_channels neighbouring channels of one head.
  template <class T>
  struct Tile {
    Index head, channel, width, count;  // count: of strips
    Strip operator[](Index i) const { return {head, channel + i * lanes<T>, std::min(lanes<T>, width - i * lanes<T>)}; }
  };

  template <class T>
  struct Tiles {
    Index heads, P, N, per_head;

    template <class F>
    explicit Tiles(const SelectiveScanInputs<T, F>& in)
        : heads(in.B.shape[1]), P(in.u.cols() / heads), N(in.B.shape[2]), per_head(ceil_div(P, tile_channels)) {}

    Index count() const { return heads * per_head; }
    Tile<T> operator[](Index i) const {
      const Index head = i / per_head, offset = i % per_head * tile_channels,
                  width = std::min(tile_channels, P - offset);
      return {head, head * P + offset, width, ceil_div(width, lanes<T>)};
    }
  };

  /// Memory of one backward task; strip(i) is the part of strip i.
  template <class T>
  struct Scratch {
    T *a, *states, *decays, *d_B, *d_C, *adjoint, *d_a, *dt, *u;

    static Index size(Index N) {
      return (N + (4 * scan_chunk + 1) * N) * lanes<T> + 2 * (N + scan_chunk) * tile_channels;
    }
    Scratch(T* memory, Index N)
        : a(memory),                                         // (N, lanes)
          states(a + N * lanes<T>),                          // (1 + scan_chunk, N, lanes): s_{t-1} at t
          decays(states + (scan_chunk + 1) * N * lanes<T>),  // (scan_chunk, N, lanes)
          d_B(decays + scan_chunk * N * lanes<T>),           // (scan_chunk, N, lanes), summed over strips
          d_C(d_B + scan_chunk * N * lanes<T>),              // (scan_chunk, N, lanes), summed over strips
          adjoint(d_C + scan_chunk * N * lanes<T>),          // (strips, N, lanes)
          d_a(adjoint + N * tile_channels),                  // (strips, N, lanes)
          dt(d_a + N * tile_channels),                       // (strips, scan_chunk, lanes)
          u(dt + scan_chunk * tile_channels) {}              // (strips, scan_chunk, lanes)
    Scratch strip(Index i, Index N) const {
      Scratch part = *this;
      part.adjoint += i * N * lanes<T>;
      part.d_a += i * N * lanes<T>;
      part.dt += i * scan_chunk * lanes<T>;
      part.u += i * scan_chunk * lanes<T>;
      return part;
    }
  };

  template <class T>
  static Pack<T> load(const T* from) {
    return kernel::load(from);
  }
  template <class T>
  static Pack<std::remove_const_t<T>> load(Matrix<T> from, Index row, Strip strip) {
    return kernel::load<std::remove_const_t<T>>(&from(row, strip.channel), strip.width);
  }
  template <class T>
  static Pack<std::remove_const_t<T>> load(Vector<T> from, Strip strip) {
    return kernel::load<std::remove_const_t<T>>(from.data + strip.channel, strip.width);
  }
  template <class T>
  static void store(Matrix<T> to, Index row, Strip strip, const Pack<T>& pack) {
    kernel::store(&to(row, strip.channel), pack, strip.width);
  }

  /// a = -exp(A_log) log2(e) of a strip, (N, lanes): the decay is 2^(dt a).
  template <class T, class F>
  static void load_decay(const SelectiveScanInputs<T, F>& in, Strip strip, Index N, T* a) {
    if (strip.width < lanes<T>) std::fill_n(a, N * lanes<T>, T(0));
    for (Index c = 0; c < strip.width; ++c) {
      const F* from = &in.A_log(strip.channel + c, 0);
      for (Index n = 0; n < N; ++n) a[n * lanes<T> + c] = from[n];
    }
    for (Index n = 0; n < N; ++n)
      kernel::store(a + n * lanes<T>, Pack<T>(kernel::exp<T>(load(a + n * lanes<T>)) * T(-1.44269504088896340736)));
  }

  /// A row's state of a strip, (N, lanes); zeros where there is none.
  template <class T>
  static void load_state(Tensor<T, 3> state, Index row, Strip strip, Index N, T* s) {
    for (Index n = 0; n < N; ++n)
      kernel::store(s + n * lanes<T>, state ? load(state[row], n, strip) : kernel::zeros<T>());
  }
  template <class T>
  static void store_state(Matrix<T> state, Strip strip, Index N, const T* s) {
    for (Index n = 0; n < N; ++n) store(state, n, strip, load(s + n * lanes<T>));
  }

  /// dt = softplus(delta + bias) and u of a chunk, (strips, scan_chunk, lanes). Asks for what is read after: rows lie
  /// further apart than the processor looks ahead by itself.
  template <class T, class F>
  static void load_chunk(const SelectiveScanInputs<T, F>& in, const Tile<T>& strips, Index first, Index count, T* dt,
                         T* u) {
    for (Index t = 0; t < count; ++t) {
      const Index bytes = strips.width * static_cast<Index>(sizeof(T));
      kernel::prefetch(&in.z(first + t, strips.channel), bytes);
      const Index next = std::min(first + t + scan_chunk, in.u.rows() - 1);
      kernel::prefetch(&in.delta(next, strips.channel), bytes);
      kernel::prefetch(&in.u(next, strips.channel), bytes);
      for (Index i = 0; i < strips.count; ++i) {
        const Index at = (i * scan_chunk + t) * lanes<T>;
        kernel::store(dt + at,
                      kernel::softplus<T>(load(in.delta, first + t, strips[i]) + load(in.delta_bias, strips[i])));
        kernel::store(u + at, load(in.u, first + t, strips[i]));
      }
    }
  }

  /// One strip through one chunk: s is advanced, and dt_t replaced by sum_n C_t[n] s_t[n] + D u_t.
  template <class T, class F>
  static void scan(const SelectiveScanInputs<T, F>& in, Strip strip, Index first, Index count, Index N, const T* a,
                   T* s, T* dt, const T* u) {
    const Pack<T> skip = load(in.D, strip);
    for (Index t = 0; t < count; ++t) {
      const T* B = &in.B(first + t, strip.head, 0);
      const T* C = &in.C(first + t, strip.head, 0);
      const Pack<T> dt_t = load(dt + t * lanes<T>), u_t = load(u + t * lanes<T>), dt_u = dt_t * u_t;
      Pack<T> sum = skip * u_t;
      for (Index n = 0; n < N; ++n) {
        const Pack<T> decay = kernel::exp2_of_negative<T>(dt_t * load(a + n * lanes<T>));
        const Pack<T> s_t = decay * load(s + n * lanes<T>) + dt_u * B[n];
        kernel::store(s + n * lanes<T>, s_t);
        sum += s_t * C[n];
      }
      kernel::store(dt + t * lanes<T>, sum);
    }
  }

  template <class T, class F>
  static void backward_chunk(const SelectiveScanInputs<T, F>& in, Matrix<const T> d_y, Strip strip, Index first,
                             Index count, Matrix<const F> checkpoint, const SelectiveScanGradients<T, F>& out,
                             const Scratch<T>& at, Pack<T>& d_skip, Pack<T>& d_bias) {
    const Index N = checkpoint.rows(), step = N * lanes<T>;
    load_decay(in, strip, N, at.a);
    for (Index n = 0; n < N; ++n) kernel::store(at.states + n * lanes<T>, load(checkpoint, n, strip));
    const Pack<T> skip = load(in.D, strip), bias = load(in.delta_bias, strip);

    for (Index t = 0; t < count; ++t) {  // states again, and the gradient of z
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
  template <class T, class F>
  static void add_parameter_gradients(const SelectiveScanInputs<T, F>& in, Strip strip, Index N, const T* d_a,
                                      const Pack<T>& d_skip, const Pack<T>& d_bias,
                                      const SelectiveScanGradients<T, F>& out) {
    for (Index c = 0; c < strip.width; ++c) {
      const Index channel = strip.channel + c;
      for (Index n = 0; n < N; ++n) out.A_log(channel, n) -= d_a[n * lanes<T> + c] * std::exp(in.A_log(channel, n));
      out.D[channel] += d_skip[c];
      out.delta_bias[channel] += d_bias[c];
    }
  }
};

}  // namespace zamba
