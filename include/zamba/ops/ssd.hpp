// SPDX-License-Identifier: MIT
// ssd: the recurrence of Mamba-2, state space duality: one decay a head, B and C shared by the heads of a group.
//
//   dt_t = max( softplus(delta_t + dt_bias), dt_min )            per head
//   s_t  = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t                  A = -exp(A_log); per channel and state n
//   y_t  = sum_n C_t[n] s_t[n] + D u_t
//
// Source: Mamba-2 (arXiv 2405.21060), listing 1. H heads of P channels, G groups of H / G heads.
// Forwards this recurrence runs as it stands, some tokens and channels at once in registers: on a CPU, where products
// of matrices are no cheaper than other arithmetic, that takes no more time than the chunks of the paper. Backwards,
// with a_t = exp(dt_t A), v_t = dt_t u_t and s the state before a chunk, a chunk is matrix products:
//
//   y_t  = e_t C_t s + sum_{j <= t} K_tj (C_t . B_j) v_j + D u_t,   e_t the product of the chunk's a up to t,
//   s    = e_last s + sum_j f_j B_j v_j                             K_tj that of those after j, and f_j = K_last,j
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
          copy(kept(h), s(h));
      }
      Index number = sequences.offsets[row] / chunk + row;
      for (Index at = 0; at < length; at += chunk, ++number) {
        const Chunk<T> c(in, block, sequences.offsets[row] + at, std::min(chunk, length - at), at_worker);
        for (Index h = 0; h < block.heads; ++h) {
          const Index channel = (block.head + h) * P;
          if (checkpoints) copy(s(h), checkpoints[number].columns(channel, P));
          recur(in, c, h, s(h), y.slice(c.first, c.count).columns(channel, P));
        }
      }
      if (state && !in_place)
        for (Index h = 0; h < block.heads; ++h) copy(s(h), kept(h));
    });
  }

  template <class Ctx, class T, class F>
  static Matrix<T> scratch(Ctx& ctx, const SsdInputs<T, F>& in, const Sequences&, Tensor<F, 3>, Matrix<T>, Tensor<F, 3>,
                           Index chunk) {
    const Blocks blocks(in);
    return ctx.arena().template tensor<T>(Index{ctx.threads()},
                                          Chunk<T>::size(chunk, blocks) + padded(blocks.heads * blocks.N * blocks.P));
  }

  /// Per chunk, last to first, with the gradient g of the state after the chunk, M = K * (C B^T), and the logarithms
  /// l_t = log e_t, so that K_tj = exp(l_t - l_j):
  ///   dC = (e dy) s^T + dCB B        dB = (f v) g^T + dCB^T C       dCB = sum over heads of K * (dy v^T)
  ///   dv = f (B g) + M^T dy          g_before = e_last g + C^T (e dy)
  ///   dl: each of e, f and K is its own derivative; d(dt A)_j = sum_{t >= j} dl_t
  /// A task owns its heads over all rows, so parameter gradients have one writer.
  template <class T, class F>
  static void backward(Context<cpu>& ctx, Matrix<const T> d_y, const SsdInputs<T, F>& in, const Sequences& sequences,
                       Tensor<const F, 3> checkpoints, const SsdGradients<T, F>& out, Tensor<F, 3> d_state,
                       Index chunk) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Blocks blocks(in);
    const Index N = blocks.N;
    ArenaScope scope(ctx.arena());
    const auto partial = ctx.arena().tensor<T>(blocks.count(), sequences.tokens, 2 * N);  // each task's dB and dC
    const auto memory =
        ctx.arena().tensor<T>(Index{ctx.threads()}, Chunk<T>::size(chunk, blocks) + Adjoint<T>::size(chunk, blocks));
    ctx.parallel_for(blocks.count(), [&](Index task, int worker) {
      const Block block = blocks[task];
      T* scratch = memory[worker].data;
      const Adjoint<T> adjoint(block, N, chunk, scratch);
      for (Index row = 0; row < sequences.rows; ++row) {
        const Index begin = sequences.offsets[row], length = sequences.length(row);
        if (length == 0) continue;
        if (d_state)
          copy(d_state[row].columns(block.channel(), block.channels()), adjoint.g);
        else
          std::fill_n(adjoint.g.data, adjoint.g.size(), T(0));
        for (Index k = (length - 1) / chunk; k >= 0; --k) {
          const Chunk<T> c(in, block, begin + k * chunk, std::min(chunk, length - k * chunk), scratch);
          c.prepare_products(in, adjoint.products);
          const auto s = checkpoints[begin / chunk + row + k].columns(block.channel(), block.channels());
          const Matrix<T> d_BC = partial[task].slice(c.first, c.count);
          differentiate(in, c, s, d_y.slice(c.first, c.count).columns(block.channel(), block.channels()), adjoint, out,
                        d_BC.columns(0, N), d_BC.columns(N, N));
        }
        if (!d_state) continue;
        // A row that began from zero has no initial state to receive a gradient.
        if (sequences.start(row) == 0) std::fill_n(adjoint.g.data, adjoint.g.size(), T(0));
        copy(adjoint.g, d_state[row].columns(block.channel(), block.channels()));
      }
    });
    ctx.parallel_for(sequences.tokens, [&](Index token, int) {
      for (Index group = 0; group < blocks.G; ++group)
        for (Index n = 0; n < N; ++n) {
          T d_B = 0, d_C = 0;
          for (Index task = group * blocks.per_group; task < (group + 1) * blocks.per_group; ++task) {
            d_B += partial(task, token, n);
            d_C += partial(task, token, N + n);
          }
          out.B(token, group, n) = d_B;
          out.C(token, group, n) = d_C;
        }
    });
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

  static Index padded(Index count) { return kernel::padded_to_line(count); }
  template <class T>
  static T* take(T*& memory, Index count) {
    return kernel::take_line(memory, count);
  }

  /// Memory of a backward task.
  template <class T>
  struct Adjoint {
    Matrix<T> g, g_before;         // (N, W): the gradient of the state after and before the chunk
    Matrix<T> v, e_dy, work, d_v;  // (chunk, W)
    Matrix<T> d_CB, K;             // (chunk, chunk)
    Matrix<T> d_l;                 // (chunk, heads)
    T* products;                   // scratch of add_product

    static Index size(Index chunk, const Blocks& blocks) {
      const Index W = blocks.most_channels();
      return products_of(chunk, blocks.N, W, blocks.P) + 2 * padded(blocks.N * W) + 4 * padded(chunk * W) +
             padded(chunk * chunk) + chunk * padded(chunk) + padded(chunk * blocks.heads);
    }
    static Index products_of(Index chunk, Index N, Index W, Index P) {
      const auto of = [](Index rows, Index depth, Index cols) { return kernel::product_scratch<T>(rows, depth, cols); };
      return std::max({of(chunk, W, N), of(chunk, N, W), of(N, chunk, W), of(chunk, N, chunk), of(chunk, chunk, N),
                       of(chunk, chunk, P), of(chunk, P, chunk)});
    }
    Adjoint(const Block& block, Index N, Index chunk, T*& memory)
        : g(take(memory, N * block.channels()), N, block.channels()),
          g_before(take(memory, N * block.channels()), N, block.channels()),
          v(take(memory, chunk * block.channels()), chunk, block.channels()),
          e_dy(take(memory, chunk * block.channels()), chunk, block.channels()),
          work(take(memory, chunk * block.channels()), chunk, block.channels()),
          d_v(take(memory, chunk * block.channels()), chunk, block.channels()),
          d_CB(take(memory, chunk * chunk), chunk, chunk),
          K(take(memory, chunk * padded(chunk)), chunk, padded(chunk)),
          d_l(take(memory, chunk * block.heads), chunk, block.heads),
          products(take(memory, products_of(chunk, N, block.channels(), block.P))) {}
  };

  template <class From, class To>
  static void copy(Matrix<From> from, Matrix<To> to) {
    for (Index i = 0; i < from.rows(); ++i) std::copy_n(&from(i, 0), from.cols(), &to(i, 0));
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

  /// One chunk of the backward pass: s (N, W) is the state before it; at.g is taken back over the chunk.
  template <class T, class F>
  static void differentiate(const SsdInputs<T, F>& in, const Chunk<T>& c, Matrix<const F> s, Matrix<const T> d_y,
                            const Adjoint<T>& at, const SsdGradients<T, F>& out, Matrix<T> d_B, Matrix<T> d_C) {
    const Index P = c.block.P, heads = c.block.heads, last = c.count - 1;
    const Matrix<const T> u = in.u.slice(c.first, c.count).columns(c.block.channel(), c.block.channels());
    const auto part = [&](Matrix<T> m) { return m.slice(0, c.count); };
    const Matrix<T> v = part(at.v), e_dy = part(at.e_dy), work = part(at.work), d_v = part(at.d_v), d_l = part(at.d_l);
    const Matrix<T> d_CB(at.d_CB.data, c.count, c.count);
    const Matrix<T> padded_K(at.K.data, c.count, padded(c.count)), K = padded_K.columns(0, c.count);
    const auto of_head = [&](auto m, Index h) { return kernel::map(m.columns(h * P, P)); };

    for (Index h = 0; h < heads; ++h)
      for (Index t = 0; t < c.count; ++t) {
        const T e = c.e(t, h), dt = c.dt(t, h);
        kernel::for_packs<T>(P, [&](Index p, auto lanes) {
          const Index i = h * P + p;
          kernel::store(&e_dy(t, i), Pack<T>(kernel::load(&d_y(t, i), lanes) * e), lanes);
          kernel::store(&v(t, i), Pack<T>(kernel::load(&u(t, i), lanes) * dt), lanes);
        });
      }

    // Through the state before the chunk.
    kernel::set_product(d_C, e_dy, kernel::transposed(s), at.products);
    kernel::set_product(work, c.C, s, at.products);
    for (Index h = 0; h < heads; ++h)
      kernel::map(d_l).col(h) = (of_head(e_dy, h).array() * of_head(work, h).array()).rowwise().sum();
    kernel::set_product(at.g_before, kernel::transposed(c.C), e_dy, at.products);

    // Through the state after it.
    kernel::set_product(work, c.B, at.g, at.products);
    for (Index h = 0; h < heads; ++h) {
      for (Index t = 0; t < c.count; ++t) {
        const T f = c.f(t, h);
        Pack<T> product = kernel::zeros<T>();
        kernel::for_packs<T>(P, [&](Index p, auto lanes) {
          const Index i = h * P + p;
          const Pack<T> f_g = f * kernel::load(&work(t, i), lanes);
          product += f_g * kernel::load(&v(t, i), lanes);
          kernel::store(&d_v(t, i), f_g, lanes);
          kernel::store(&e_dy(t, i), Pack<T>(f * kernel::load(&v(t, i), lanes)), lanes);  // now f v
        });
        const T d_f = kernel::sum<T>(product);
        d_l(t, h) -= d_f;
        d_l(last, h) += d_f;
      }
      const T decay = c.e(last, h);
      d_l(last, h) += decay * (of_head(s, h).array() * of_head(at.g, h).array()).sum();
      of_head(at.g_before, h) += decay * of_head(at.g, h);
    }
    kernel::set_product(d_B, e_dy, kernel::transposed(at.g), at.products);
    copy(at.g_before, at.g);

    // Within the chunk.
    const Matrix<T> CB = c.CB.columns(0, c.count), M = c.M.columns(0, c.count);
    kernel::map(d_CB).setZero();
    for (Index h = 0; h < heads; ++h) {
      c.decays(h, padded_K);
      kernel::map(M).array() = kernel::map(K).array() * kernel::map(CB).array();
      const Matrix<const T> d_y_h = d_y.columns(h * P, P);
      kernel::add_product(d_v.columns(h * P, P), kernel::transposed(M), d_y_h, at.products);
      kernel::set_product(M, d_y_h, kernel::transposed(v.columns(h * P, P)), at.products);
      kernel::map(K).array() *= kernel::map(M).array();
      kernel::map(d_CB) += kernel::map(K);
      kernel::map(K).array() *= kernel::map(CB).array();
      kernel::map(d_l).col(h) += kernel::map(K).rowwise().sum() - kernel::map(K).colwise().sum().transpose();
    }
    kernel::add_product(d_C, d_CB, c.B, at.products);
    kernel::add_product(d_B, kernel::transposed(d_CB), c.C, at.products);

    for (Index h = 0; h < heads; ++h) finish_head(in, c, h, u, d_y, d_v, d_l, out);
  }

  /// From d_v and d_l of head h to the gradients of u, delta and the head's parameters.
  template <class T, class F>
  static void finish_head(const SsdInputs<T, F>& in, const Chunk<T>& c, Index h, Matrix<const T> u, Matrix<const T> d_y,
                          Matrix<T> d_v, Matrix<T> d_l, const SsdGradients<T, F>& out) {
    const Index P = c.block.P, head = c.block.head + h;
    const T skip = in.D[head];
    T d_dtA = 0, d_a = 0, d_skip = 0, d_bias = 0;
    for (Index t = c.count - 1; t >= 0; --t) {
      const T dt = c.dt(t, h);
      Pack<T> through_v = kernel::zeros<T>(), through_skip = through_v;
      kernel::for_packs<T>(P, [&](Index p, auto lanes) {
        const Index i = h * P + p;
        const Pack<T> u_p = kernel::load(&u(t, i), lanes), dy = kernel::load(&d_y(t, i), lanes),
                      dv = kernel::load(&d_v(t, i), lanes);
        through_v += dv * u_p;
        through_skip += dy * u_p;
        kernel::store(&out.u(c.first + t, head * P + p), Pack<T>(dt * dv + skip * dy), lanes);
      });
      d_dtA += d_l(t, h);
      d_a += d_dtA * dt;
      d_skip += kernel::sum<T>(through_skip);
      const T d_dt = c.A[h] * d_dtA + kernel::sum<T>(through_v), x = in.delta(c.first + t, head) + in.dt_bias[head];
      const T slope = x > T(20) ? T(1) : T(1) / (T(1) + std::exp(-x));
      const T d_delta = dt > static_cast<T>(in.dt_min) ? d_dt * slope : T(0);
      out.delta(c.first + t, head) = d_delta;
      d_bias += d_delta;
    }
    out.A_log[head] += d_a * c.A[h];
    out.D[head] += d_skip;
    out.dt_bias[head] += d_bias;
  }
};

}  // namespace zamba
