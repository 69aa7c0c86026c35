// SPDX-License-Identifier: MIT
// ssd: the recurrence of Mamba-2, state space duality: one decay a head, B and C shared by the heads of a group.
//
//   dt_t = max( softplus(delta_t + dt_bias), dt_min )            per head
//   s_t  = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t                  A = -exp(A_log); per channel and state n
//   y_t  = sum_n C_t[n] s_t[n] + D u_t
//
// Source: Mamba-2 (arXiv 2405.21060), listing 1. H heads of P channels, G groups of H / G heads.
// Forwards the CPU takes the recurrent form as it stands, some tokens and channels at once in registers: where products
// of matrices are no cheaper than other arithmetic, that takes no more time than the chunks of the paper. Backwards,
// and on tensor cores, a chunk is matrix products (the chunk scan). With a_t = exp(dt_t A), v_t = dt_t u_t and s the
// state before the chunk:
//
//   y_t  = e_t C_t s                                inter-chunk; e_t the product of the chunk's a up to t
//        + sum_{j <= t} K_tj (C_t . B_j) v_j        intra-chunk; K_tj the product of those after j, up to t
//        + D u_t
//   s    = e_last s + sum_j f_j B_j v_j             chunk state, state passing; f_j = K_last,j
//
// Kept for the backward pass: the state at the start of every chunk of a row ("checkpoints"); the rest is computed
// again.
//
// Numeric contract: everything in compute_t (float, or double for double). Sums over n run in order, over time too; a
// sequence that is cut in two agrees to rounding. Backwards the decay from one position to another is the product of
// those between them, as accurate however strong the decays before were, which differences of sums of dt A would not
// be; below 1e-31 (float; 1e-292) it is 0. Gradients for two chunk lengths agree to rounding. No order depends on the
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/ops/ssd/backward.hpp>
#include <zamba/ops/ssd/chunk.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// What an ssd reads. A: type of activations; F: type of the precise parameters.
template <class A, class F>
struct SsdInputs {
  Matrix<const A> u;        // (tokens, D = H P) after the convolution
  Matrix<const A> delta;    // (tokens, H) before bias and softplus
  Tensor<const A, 3> B;     // (tokens, G, N)
  Tensor<const A, 3> C;     // (tokens, G, N)
  Vector<const F> A_log;    // (H)
  Vector<const F> D;        // (H)
  Vector<const F> dt_bias;  // (H)
  double dt_min = 0;        // dt is at least this
};

/// The gradients of SsdInputs: activations are assigned, parameters added to.
template <class A, class F>
struct SsdGradients {
  Matrix<A> u, delta;
  Tensor<A, 3> B, C;
  Vector<F> A_log, D, dt_bias;
};

/// Positions between two kept states, and computed together backwards.
inline constexpr Index ssd_chunk = 64;

/// How many states a batch keeps at most; row r's chunk k is kept at offsets[r] / chunk + r + k.
constexpr Index ssd_checkpoint_count(const Sequences& sequences, Index chunk = ssd_chunk) {
  return sequences.tokens / chunk + sequences.rows;
}

ZAMBA_DECLARE_OPERATOR(Ssd, "ssd.cuh");

namespace kernel {

template <class A, class F>
void check_inputs(const Door& door, const SsdInputs<A, F>& in, Index n) {
  const Index D = in.u.cols(), G = in.B.shape[1], H = in.delta.cols(), N = in.B.shape[2];
  door.shape("u", in.u, n, D);
  door.shape("delta", in.delta, n, H);
  door.shape("B", in.B, n, G, N);
  door.shape("C", in.C, n, G, N);
  door.shape("A_log", in.A_log, H);
  door.shape("D", in.D, H);
  door.shape("dt_bias", in.dt_bias, H);
  require(G > 0 && H > 0 && H % G == 0 && D % H == 0, door.name, ": ", D, " channels in ", H, " heads of ", G,
          " groups");
}

}  // namespace kernel

/// y (tokens, D). state (rows, N, D), optional: read where the row has a past, rewritten with the row's last state.
/// checkpoints (ssd_checkpoint_count, N, D), optional: kept for ssd_backward.
template <class Device, class A, class F = compute_t<A>>
void ssd(Context<Device>& ctx, const std::type_identity_t<SsdInputs<A, F>>& in, const Sequences& sequences,
         std::type_identity_t<Tensor<F, 3>> state, Matrix<A> y, std::type_identity_t<Tensor<F, 3>> checkpoints = {},
         Index chunk = ssd_chunk) {
  if constexpr (checked) {
    const kernel::Door door{"ssd"};
    const Index n = sequences.tokens, D = in.u.cols(), N = in.B.shape[2];
    kernel::check_inputs(door, in, n);
    door.optional("state", state, sequences.rows, N, D);
    door.shape("y", y, n, D);
    door.optional("checkpoints", checkpoints, ssd_checkpoint_count(sequences, chunk), N, D);
  }
  Ssd<Device>::template forward<A, F>(ctx, in, sequences, state, y, checkpoints, chunk);
}

/// d_state (rows, N, D), optional; in: the gradient of the final state, out: that of the initial state. chunk: as in
/// the forward pass.
template <class Device, class A, class F>
void ssd_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_y,
                  const std::type_identity_t<SsdInputs<A, F>>& in, const Sequences& sequences,
                  std::type_identity_t<Tensor<const F, 3>> checkpoints, const SsdGradients<A, F>& gradients,
                  std::type_identity_t<Tensor<F, 3>> d_state = {}, Index chunk = ssd_chunk) {
  if constexpr (checked) {
    const kernel::Door door{"ssd_backward"};
    const Index n = sequences.tokens, D = in.u.cols(), G = in.B.shape[1], H = in.delta.cols(), N = in.B.shape[2];
    kernel::check_inputs(door, in, n);
    door.shape("d_y", d_y, n, D);
    door.shape("checkpoints", checkpoints, ssd_checkpoint_count(sequences, chunk), N, D);
    door.shape("gradient of u", gradients.u, n, D);
    door.shape("gradient of delta", gradients.delta, n, H);
    door.shape("gradient of B", gradients.B, n, G, N);
    door.shape("gradient of C", gradients.C, n, G, N);
    door.shape("gradient of A_log", gradients.A_log, H);
    door.shape("gradient of D", gradients.D, H);
    door.shape("gradient of dt_bias", gradients.dt_bias, H);
    door.optional("d_state", d_state, sequences.rows, N, D);
  }
  Ssd<Device>::backward(ctx, d_y, in, sequences, checkpoints, gradients, d_state, chunk);
}

/// A task takes some neighbouring heads of a group, which share B and C, through a row in chunks.
template <>
struct Ssd<cpu> {
  template <class T, class F>
  static void forward(Context<cpu>& ctx, const SsdInputs<T, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                      Matrix<T> y, Tensor<F, 3> checkpoints, Index chunk) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Blocks blocks(in);
    const Index N = blocks.N, P = blocks.P;
    ArenaScope scope(ctx.arena());
    const Matrix<T> memory = scratch(ctx, in, sequences, state, y, checkpoints, chunk);
    ctx.parallel_for(sequences.rows * blocks.count(), [&](Index task, int worker) {
      const Index row = task / blocks.count(), length = sequences.length(row);
      if (length == 0) return;
      const Block block = blocks[task % blocks.count()];
      T* at_worker = memory[worker].data;
      const Tensor<T, 3> own(take(at_worker, block.heads * N * P), block.heads, N, P);
      // Rows of a state in its place are far apart, which is slow to come back to: one that is met often is copied.
      const bool in_place = state && length <= few_tokens;
      const auto kept = [&](Index h) { return state[row].columns((block.head + h) * P, P); };
      const auto s = [&](Index h) { return in_place ? kept(h) : own[h]; };
      for (Index h = 0; h < block.heads; ++h) {
        if (!state || sequences.start(row) == 0)
          for (Index n = 0; n < N; ++n) std::fill_n(&s(h)(n, 0), P, T(0));
        else if (!in_place)
          kernel::copy_rows(kept(h), s(h));
      }
      Index number = sequences.offsets[row] / chunk + row;
      for (Index at = 0; at < length; at += chunk, ++number) {
        const Chunk<T> c(in, block, sequences.offsets[row] + at, std::min(chunk, length - at), at_worker);
        for (Index h = 0; h < block.heads; ++h) {
          const Index channel = (block.head + h) * P;
          if (checkpoints) kernel::copy_rows(s(h), checkpoints[number].columns(channel, P));
          recur(in, c, h, s(h), y.slice(c.first, c.count).columns(channel, P));
        }
      }
      if (state && !in_place)
        for (Index h = 0; h < block.heads; ++h) kernel::copy_rows(s(h), kept(h));
    });
  }

  template <class Ctx, class T, class F>
  static Matrix<T> scratch(Ctx& ctx, const SsdInputs<T, F>& in, const Sequences&, Tensor<F, 3>, Matrix<T>, Tensor<F, 3>,
                           Index chunk) {
    const Blocks blocks(in);
    return ctx.arena().template tensor<T>(
        Index{ctx.threads()},
        Chunk<T>::size(chunk, blocks) + kernel::padded_to_line(blocks.heads * blocks.N * blocks.P));
  }

  template <class T, class F>
  static void backward(Context<cpu>& ctx, Matrix<const T> d_y, const SsdInputs<T, F>& in, const Sequences& sequences,
                       Tensor<const F, 3> checkpoints, const SsdGradients<T, F>& out, Tensor<F, 3> d_state,
                       Index chunk) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    kernel::SsdBackward<T>::run(ctx, d_y, in, sequences, checkpoints, out, d_state, chunk);
  }
  template <class Ctx, class T, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const T>, const SsdInputs<T, F>& in, const Sequences& sequences,
                               Tensor<const F, 3>, const SsdGradients<T, F>&, Tensor<F, 3>, Index chunk) {
    kernel::SsdBackward<T>::room(ctx, Blocks(in), sequences.tokens, chunk);
  }

 private:
  template <class T>
  using Pack = kernel::Pack<T>;

  template <class T>
  using Chunk = kernel::SsdChunk<T>;
  using Block = kernel::SsdBlock;
  using Blocks = kernel::SsdBlocks;

  /// Up to so many tokens of a row leave its state in its place.
  static constexpr Index few_tokens = 4;
  /// Tokens and registers of channels that are advanced at once: as many sums as registers allow.
  static constexpr Index tokens_at_once = 4, packs_at_once = kernel::register_bytes == 64 ? 2 : 1;

  template <class T>
  static T* take(T*& memory, Index count) {
    return kernel::take_line(memory, count);
  }

  /// The recurrence of head h over a chunk; s (N, P) is advanced.
  template <class T>
  static void recur(const SsdInputs<T, T>& in, const Chunk<T>& c, Index h, Matrix<T> s, Matrix<T> y) {
    const Index P = c.block.P, bytes = P * static_cast<Index>(sizeof(T)), end = in.u.rows();
    const Matrix<const T> u = in.u.columns((c.block.head + h) * P, P);
    // Rows are pages apart, so the processor does not foresee them: the next chunk's of u, the next rows of y.
    const auto ask_ahead = [&](Index t) {
      if (c.first + c.count + t < end) kernel::prefetch(&u(c.first + c.count + t, 0), bytes);
      if (t + tokens_at_once < c.count) kernel::prefetch(&y(t + tokens_at_once, 0), bytes);
    };
    Index t = 0;
    for (; t + tokens_at_once <= c.count; t += tokens_at_once) {
      for (Index r = 0; r < tokens_at_once; ++r) ask_ahead(t + r);
      steps<tokens_at_once>(in, c, h, t, s, y);
    }
    for (; t < c.count; ++t) steps<1>(in, c, h, t, s, y);
  }

  /// Tokens [t, t + Tokens) of the chunk: each part of the state is read and written once for all of them.
  template <Index Tokens, class T>
  static void steps(const SsdInputs<T, T>& in, const Chunk<T>& c, Index h, Index t, Matrix<T> s, Matrix<T> y) {
    constexpr std::integral_constant<Index, kernel::lanes<T>> full;
    constexpr Index packs = Tokens == 1 ? 2 * packs_at_once : packs_at_once;
    const Index P = c.block.P;
    Index p = 0;
    for (; p + packs * full <= P; p += packs * full) advance<Tokens, packs>(in, c, h, t, s, y, p, full);
    for (; p + full <= P; p += full) advance<Tokens, 1>(in, c, h, t, s, y, p, full);
    if (p < P) advance<Tokens, 1>(in, c, h, t, s, y, p, P - p);
  }

  /// Channels from p on: Packs registers of them, the last of `lanes` channels.
  template <Index Tokens, Index Packs, class T, class Lanes>
  static void advance(const SsdInputs<T, T>& in, const Chunk<T>& c, Index h, Index t, Matrix<T> s, Matrix<T> y, Index p,
                      Lanes lanes) {
    const Index head = c.block.head + h, channel = head * c.block.P + p;
    constexpr std::size_t tokens = Tokens, packs = Packs;
    const T *B[tokens], *C[tokens];
    T decay[tokens];
    Pack<T> v[tokens][packs], sums[tokens][packs];
    const auto all = [](auto&& f) __attribute__((always_inline)) {
      kernel::unrolled<Tokens>([&](auto r) __attribute__((always_inline)) {
        kernel::unrolled<Packs>([&](auto i) __attribute__((always_inline)) { f(r, i); });
      });
    };
    kernel::unrolled<Tokens>([&](auto r) __attribute__((always_inline)) {
      B[r] = &in.B(c.first + t + r, c.block.group, 0);
      C[r] = &in.C(c.first + t + r, c.block.group, 0);
      decay[r] = c.decay(t + r, h);
    });
    all([&](auto r, auto i) __attribute__((always_inline)) {
      const Pack<T> u = kernel::load(&in.u(c.first + t + r, channel + i * kernel::lanes<T>), lanes);
      v[r][i] = c.dt(t + r, h) * u;
      sums[r][i] = in.D[head] * u;
    });
    for (Index n = 0; n < s.rows(); ++n) {
      Pack<T> s_n[packs];
      T* at = &s(n, p);
      kernel::unrolled<Packs>([&](auto i) __attribute__((always_inline)) {
        s_n[i] = kernel::load<T>(at + i * kernel::lanes<T>, lanes);
      });
      all([&](auto r, auto i) __attribute__((always_inline)) {
        s_n[i] = decay[r] * s_n[i] + B[r][n] * v[r][i];
        sums[r][i] += C[r][n] * s_n[i];
      });
      kernel::unrolled<Packs>([&](auto i) __attribute__((always_inline)) {
        kernel::store(at + i * kernel::lanes<T>, s_n[i], lanes);
      });
    }
    all([&](auto r, auto i)
            __attribute__((always_inline)) { kernel::store(&y(t + r, p + i * kernel::lanes<T>), sums[r][i], lanes); });
  }
};

}  // namespace zamba
