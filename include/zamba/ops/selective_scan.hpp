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
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/ops/selective_scan/backward.hpp>
#include <zamba/ops/selective_scan/strips.hpp>
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

/// Vectorised over channels (selective_scan/strips.hpp). A task takes a tile of strips through a row in chunks, so that
/// the loads of a chunk overlap instead of waiting for the recurrence.
template <>
struct SelectiveScan<cpu> {
  template <class T, class F>
  static void forward(Context<cpu>& ctx, const SelectiveScanInputs<T, F>& in, const Sequences& sequences,
                      Tensor<F, 3> state, Matrix<T> y, Tensor<F, 3> checkpoints) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    using Strips = kernel::ScanStrips<T, scan_chunk>;
    const typename Strips::Tiles tiles(in);
    const Index N = tiles.N;
    ArenaScope scope(ctx.arena());
    const Matrix<T> memory = scratch(ctx, in, sequences, state, y, checkpoints);
    ctx.parallel_for(sequences.rows * tiles.count(), [&](Index task, int worker) {
      const Index row = task / tiles.count();
      const auto strips = tiles[task % tiles.count()];
      T* a = memory[worker].data;                      // (strips, N, lanes)
      T* s = a + N * Strips::tile_channels;            // (strips, N, lanes)
      T* dt = s + N * Strips::tile_channels;           // (strips, scan_chunk, lanes); then the sums over n
      T* u = dt + scan_chunk * Strips::tile_channels;  // (strips, scan_chunk, lanes)
      const auto state_of = [&](T* states, Index i) { return states + i * N * kernel::lanes<T>; };
      const auto chunk_of = [&](T* values, Index i) { return values + i * scan_chunk * kernel::lanes<T>; };
      for (Index i = 0; i < strips.count; ++i) {
        Strips::load_decay(in, strips[i], N, state_of(a, i));
        Strips::load_state(sequences.start(row) > 0 ? state : Tensor<F, 3>{}, row, strips[i], N, state_of(s, i));
      }
      const Index end = sequences.offsets[row + 1];
      Index chunk = sequences.offsets[row] / scan_chunk + row;
      for (Index first = sequences.offsets[row]; first < end; first += scan_chunk, ++chunk) {
        const Index count = std::min(scan_chunk, end - first);
        Strips::load_chunk(in, strips, first, count, dt, u);
        for (Index i = 0; i < strips.count; ++i) {
          if (checkpoints) Strips::store_state(checkpoints[chunk], strips[i], N, state_of(s, i));
          scan(in, strips[i], first, count, N, state_of(a, i), state_of(s, i), chunk_of(dt, i), chunk_of(u, i));
        }
        for (Index t = 0; t < count; ++t)
          for (Index i = 0; i < strips.count; ++i) {
            const kernel::Pack<T> sum = Strips::load(chunk_of(dt, i) + t * kernel::lanes<T>),
                                  z = Strips::load(in.z, first + t, strips[i]);
            Strips::store(y, first + t, strips[i], kernel::Pack<T>(sum * z * kernel::sigmoid<T>(z)));
          }
      }
      if (state && sequences.length(row) > 0)
        for (Index i = 0; i < strips.count; ++i) Strips::store_state(state[row], strips[i], N, state_of(s, i));
    });
  }

  template <class Ctx, class T, class F>
  static Matrix<T> scratch(Ctx& ctx, const SelectiveScanInputs<T, F>& in, const Sequences&, Tensor<F, 3>, Matrix<T>,
                           Tensor<F, 3>) {
    constexpr Index tile_channels = kernel::ScanStrips<T, scan_chunk>::tile_channels;
    return ctx.arena().template tensor<T>(Index{ctx.threads()}, 2 * (in.B.shape[2] + scan_chunk) * tile_channels);
  }

  template <class T, class F>
  static void backward(Context<cpu>& ctx, Matrix<const T> d_y, const SelectiveScanInputs<T, F>& in,
                       const Sequences& sequences, Tensor<const F, 3> checkpoints,
                       const SelectiveScanGradients<T, F>& out, Tensor<F, 3> d_state) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    kernel::ScanBackward<T, scan_chunk>::run(ctx, d_y, in, sequences, checkpoints, out, d_state);
  }
  template <class Ctx, class T, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const T>, const SelectiveScanInputs<T, F>& in,
                               const Sequences& sequences, Tensor<const F, 3>, const SelectiveScanGradients<T, F>&,
                               Tensor<F, 3>) {
    typename kernel::ScanBackward<T, scan_chunk>::Room(ctx, in, sequences.tokens);
  }

 private:
  /// One strip through one chunk: s is advanced, and dt_t replaced by sum_n C_t[n] s_t[n] + D u_t.
  template <class T, class F>
  static void scan(const SelectiveScanInputs<T, F>& in, const typename kernel::ScanStrips<T, scan_chunk>::Strip& strip,
                   Index first, Index count, Index N, const T* a, T* s, T* dt, const T* u) {
    using Strips = kernel::ScanStrips<T, scan_chunk>;
    using Pack = kernel::Pack<T>;
    constexpr Index lanes = kernel::lanes<T>;
    const Pack skip = Strips::load(in.D, strip);
    for (Index t = 0; t < count; ++t) {
      const T* B = &in.B(first + t, strip.head, 0);
      const T* C = &in.C(first + t, strip.head, 0);
      const Pack dt_t = Strips::load(dt + t * lanes), u_t = Strips::load(u + t * lanes), dt_u = dt_t * u_t;
      Pack sum = skip * u_t;
      for (Index n = 0; n < N; ++n) {
        const Pack decay = kernel::exp2_of_negative<T>(dt_t * Strips::load(a + n * lanes));
        const Pack s_t = decay * Strips::load(s + n * lanes) + dt_u * B[n];
        kernel::store(s + n * lanes, s_t);
        sum += s_t * C[n];
      }
      kernel::store(dt + t * lanes, sum);
    }
  }
};

}  // namespace zamba
