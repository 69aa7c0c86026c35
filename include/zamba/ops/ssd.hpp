// SPDX-License-Identifier: MIT
// ssd: the recurrence of Mamba-2, state space duality: one decay a head, B and C shared by the heads of a group.
//
//   dt_t = max( softplus(delta_t + dt_bias), dt_min )            per head
//   s_t  = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t                  A = -exp(A_log); per channel and state n
//   y_t  = sum_n C_t[n] s_t[n] + D u_t
//
// Source: Mamba-2 (arXiv 2405.21060), listing 1. H heads of P channels, G groups of H / G heads.
// In chunks, with l_t = sum of dt A up to t within the chunk and s the state before it, a chunk is matrix products:
//
//   y_t = exp(l_t) C_t s  +  sum_{j <= t} exp(l_t - l_j) (C_t . B_j) dt_j u_j  +  D u_t
//   s   = exp(l_end) s  +  sum_j exp(l_end - l_j) dt_j B_j u_j
//
// Kept for the backward pass: the state at the start of every chunk of a row ("checkpoints"); the rest is computed
// again.
//
// Numeric contract: everything in compute_t (float, or double for double). Exponents are never positive, so nothing
// overflows. Chunks are another order of the same sums: results for two chunk lengths, or for a sequence cut in two,
// agree to rounding. No order depends on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/detail/eigen.hpp>
#include <zamba/detail/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
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

/// Positions computed together as matrix products.
inline constexpr Index ssd_chunk = 64;

/// How many states a batch keeps at most; row r's chunk k is kept at offsets[r] / chunk + r + k.
constexpr Index ssd_checkpoint_count(const Sequences& sequences, Index chunk = ssd_chunk) {
  return sequences.tokens / chunk + sequences.rows;
}

ZAMBA_DECLARE_OPERATOR(Ssd, "ssd.cuh");

/// y (tokens, D). state (rows, N, D), optional: read where the row has a past, rewritten with the row's last state.
/// checkpoints (ssd_checkpoint_count, N, D), optional: kept for ssd_backward.
template <class Device, class A, class F = compute_t<A>>
void ssd(Context<Device>& ctx, const std::type_identity_t<SsdInputs<A, F>>& in, const Sequences& sequences,
         std::type_identity_t<Tensor<F, 3>> state, Matrix<A> y, std::type_identity_t<Tensor<F, 3>> checkpoints = {},
         Index chunk = ssd_chunk) {
  Ssd<Device>::template forward<A, F>(ctx, in, sequences, state, y, checkpoints, chunk);
}

/// d_state (rows, N, D), optional; in: the gradient of the final state, out: that of the initial state. chunk: as in
/// the forward pass.
template <class Device, class A, class F>
void ssd_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_y,
                  const std::type_identity_t<SsdInputs<A, F>>& in, const Sequences& sequences,
                  std::type_identity_t<Tensor<const F, 3>> checkpoints, const SsdGradients<A, F>& gradients,
                  std::type_identity_t<Tensor<F, 3>> d_state = {}, Index chunk = ssd_chunk) {
  Ssd<Device>::backward(ctx, d_y, in, sequences, checkpoints, gradients, d_state, chunk);
}

/// A task takes some neighbouring heads of a group, so that products with B and C are wide, through a row in chunks.
template <>
struct Ssd<cpu> {
  template <class T, class F>
  static void forward(Context<cpu>& ctx, const SsdInputs<T, F>& in, const Sequences& sequences, Tensor<F, 3> state,
                      Matrix<T> y, Tensor<F, 3> checkpoints, Index chunk) {
    static_assert(std::is_same_v<T, F>, "zamba: on the CPU activations are of the compute type");
    const Blocks blocks(in);
    ArenaScope scope(ctx.arena());
    const Index N = blocks.N, W = blocks.most_channels();
    const auto memory =
        ctx.arena().tensor<T>(Index{ctx.threads()}, Chunk<T>::size(chunk, blocks) + padded(N * W) + padded(chunk * W));
    ctx.parallel_for(sequences.rows * blocks.count(), [&](Index task, int worker) {
      const Index row = task / blocks.count(), length = sequences.length(row);
      if (length == 0) return;
      const Block block = blocks[task % blocks.count()];
      T* scratch = memory[worker].data;
      const Matrix<T> own(take(scratch, N * W), N, block.channels());
      const Matrix<T> weighted(take(scratch, chunk * W), chunk, block.channels());
      const Matrix<F> s = state ? state[row].columns(block.channel(), block.channels()) : own;
      if (!state || sequences.start(row) == 0)
        for (Index n = 0; n < N; ++n) std::fill_n(&s(n, 0), s.cols(), F(0));
      Index number = sequences.offsets[row] / chunk + row;
      for (Index at = 0; at < length; at += chunk, ++number) {
        const Chunk<T> c(in, block, sequences.offsets[row] + at, std::min(chunk, length - at), scratch);
        if (checkpoints) copy(s, checkpoints[number].columns(block.channel(), block.channels()));
        const Matrix<T> y_c = y.slice(c.first, c.count).columns(block.channel(), block.channels());
        if (c.count <= few_tokens)
          step(in, c, s, y_c);
        else
          products(in, c, s, y_c, weighted.slice(0, c.count));
      }
    });
  }

  /// Per chunk, last to first, with the gradient g of the state after the chunk, e_t = exp(l_t), f_j = exp(l_end -
  /// l_j), v_j = dt_j u_j, K = exp(l_t - l_j) for j <= t, and M = K * (C B^T):
  ///   dC = (e dy) s^T + dCB B        dB = (f v) g^T + dCB^T C       dCB = sum over heads of K * (dy v^T)
  ///   dv = f (B g) + M^T dy          g_before = exp(l_end) g + C^T (e dy)
  ///   dl: each of e, f, K, exp(l_end) is its own derivative; d(dt A)_j = sum_{t >= j} dl_t
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
  using Pack = detail::Pack<T>;

  /// Up to so many tokens the recurrence itself, bound by reading the state, is quicker than products.
  static constexpr Index few_tokens = 4;
  /// Channels of a task, about.
  static constexpr Index task_channels = 256;

  /// Neighbouring heads of one group.
  struct Block {
    Index group, head, heads, P;
    Index channel() const { return head * P; }
    Index channels() const { return heads * P; }
  };

  struct Blocks {
    Index G, N, H, P, per_group, heads;

    template <class T, class F>
    explicit Blocks(const SsdInputs<T, F>& in)
        : G(in.B.shape[1]), N(in.B.shape[2]), H(in.delta.cols()), P(in.u.cols() / H) {
      const Index of_group = H / G, most = std::clamp<Index>(task_channels / P, 1, of_group);
      per_group = (of_group + most - 1) / most;
      heads = (of_group + per_group - 1) / per_group;
      per_group = (of_group + heads - 1) / heads;
    }
    Index count() const { return G * per_group; }
    Index most_channels() const { return heads * P; }
    Block operator[](Index i) const {
      const Index group = i / per_group, first = i % per_group * heads, of_group = H / G;
      return {group, group * of_group + first, std::min(heads, of_group - first), P};
    }
  };

  /// Scratch begins at a cache line, whichever worker's it is: Eigen sums in an order that depends on alignment.
  static Index padded(Index count) { return (count + 15) / 16 * 16; }

  template <class T>
  static T* take(T*& memory, Index count) {
    T* const taken = memory;
    memory += padded(count);
    return taken;
  }

  /// What both passes need of a chunk.
  template <class T>
  struct Chunk {
    Index first, count;
    Block block;
    Matrix<T> dt, l;       // (count, heads)
    Vector<T> a;           // (heads): A
    Matrix<T> CB;          // (count, count): C_t . B_j
    Matrix<T> M;           // (count, count): of one head at a time
    Matrix<const T> B, C;  // (count, N)

    static Index size(Index chunk, const Blocks& blocks) {
      return 2 * padded(chunk * blocks.heads) + padded(blocks.heads) + 2 * padded(chunk * chunk);
    }

    template <class F>
    Chunk(const SsdInputs<T, F>& in, const Block& of, Index at, Index tokens, T* memory)
        : first(at),
          count(tokens),
          block(of),
          dt(take(memory, count * block.heads), count, block.heads),
          l(take(memory, count * block.heads), count, block.heads),
          a(take(memory, block.heads), block.heads),
          CB(take(memory, count * count), count, count),
          M(take(memory, count * count), count, count),
          B(group_of(in.B, at, tokens, of.group)),
          C(group_of(in.C, at, tokens, of.group)) {
      for (Index h = 0; h < block.heads; ++h) a[h] = -std::exp(in.A_log[block.head + h]);
      for (Index t = 0; t < count; ++t)
        detail::for_packs<T>(block.heads, [&](Index h, auto lanes) {
          const Index head = block.head + h;
          const Pack<T> x =
              detail::load(&in.delta(first + t, head), lanes) + detail::load(in.dt_bias.data + head, lanes);
          const Pack<T> step = detail::max<T>(Pack<T>{} + static_cast<T>(in.dt_min), detail::softplus<T>(x));
          const Pack<T> before = t > 0 ? detail::load(&l(t - 1, h), lanes) : Pack<T>{};
          detail::store(&dt(t, h), step, lanes);
          detail::store(&l(t, h), Pack<T>(before + step * detail::load(a.data + h, lanes)), lanes);
        });
    }

    static Matrix<const T> group_of(Tensor<const T, 3> x, Index at, Index tokens, Index group) {
      Matrix<const T> m(&x(at, group, 0), tokens, x.shape[2]);
      m.stride[0] = x.stride[0];
      return m;
    }

    /// row[j] = scale_j * exp(l_t - l_j) for j <= t, 0 beyond, of head h.
    template <class Scale>
    void decays(Index t, Index h, T* row, Scale scale) const {
      const T l_t = l(t, h);
      for (Index j = 0; j <= t; ++j) row[j] = l_t - l(j, h);
      detail::for_packs<T>(t + 1, [&](Index j, auto lanes) {
        detail::store(row + j, detail::exp<T>(detail::load(row + j, lanes)), lanes);
      });
      for (Index j = 0; j <= t; ++j) row[j] *= scale(j);
      std::fill(row + t + 1, row + count, T(0));
    }
  };

  /// Memory of a backward task.
  template <class T>
  struct Adjoint {
    Matrix<T> g, g_before;         // (N, W): the gradient of the state after and before the chunk
    Matrix<T> v, e_dy, work, d_v;  // (chunk, W)
    Matrix<T> d_CB, K;             // (chunk, chunk)
    Matrix<T> d_l;                 // (chunk, heads)

    static Index size(Index chunk, const Blocks& blocks) {
      const Index W = blocks.most_channels();
      return 2 * padded(blocks.N * W) + 4 * padded(chunk * W) + 2 * padded(chunk * chunk) +
             padded(chunk * blocks.heads);
    }
    Adjoint(const Block& block, Index N, Index chunk, T*& memory)
        : g(take(memory, N * block.channels()), N, block.channels()),
          g_before(take(memory, N * block.channels()), N, block.channels()),
          v(take(memory, chunk * block.channels()), chunk, block.channels()),
          e_dy(take(memory, chunk * block.channels()), chunk, block.channels()),
          work(take(memory, chunk * block.channels()), chunk, block.channels()),
          d_v(take(memory, chunk * block.channels()), chunk, block.channels()),
          d_CB(take(memory, chunk * chunk), chunk, chunk),
          K(take(memory, chunk * chunk), chunk, chunk),
          d_l(take(memory, chunk * block.heads), chunk, block.heads) {}
  };

  template <class From, class To>
  static void copy(Matrix<From> from, Matrix<To> to) {
    for (Index i = 0; i < from.rows(); ++i) std::copy_n(&from(i, 0), from.cols(), &to(i, 0));
  }

  /// The recurrence, token by token; s (N, W) is advanced.
  template <class T, class F>
  static void step(const SsdInputs<T, F>& in, const Chunk<T>& c, Matrix<F> s, Matrix<T> y) {
    for (Index t = 0; t < c.count; ++t)
      for (Index h = 0; h < c.block.heads; ++h) {
        const Index head = c.block.head + h, from = h * c.block.P;
        const T dt = c.dt(t, h), decay = std::exp(dt * c.a[h]);
        detail::for_packs<T>(c.block.P, [&](Index p, auto lanes) {
          const Pack<T> u = detail::load(&in.u(c.first + t, head * c.block.P + p), lanes), dt_u = dt * u;
          Pack<T> sum = in.D[head] * u;
          for (Index n = 0; n < s.rows(); ++n) {
            T* at = &s(n, from + p);
            const Pack<T> s_n = decay * detail::load<T>(at, lanes) + c.B(t, n) * dt_u;
            detail::store(at, s_n, lanes);
            sum += c.C(t, n) * s_n;
          }
          detail::store(&y(t, from + p), sum, lanes);
        });
      }
  }

  /// The chunk as products; s (N, W) is advanced. weighted (count, W) is scratch.
  template <class T, class F>
  static void products(const SsdInputs<T, F>& in, const Chunk<T>& c, Matrix<F> s, Matrix<T> y, Matrix<T> weighted) {
    const Index P = c.block.P, last = c.count - 1;
    const Matrix<const T> u = in.u.slice(c.first, c.count).columns(c.block.channel(), c.block.channels());
    detail::map(c.CB).noalias() = detail::map(c.C) * detail::map(c.B).transpose();
    detail::map(y).noalias() = detail::map(c.C) * detail::map(s);
    for (Index h = 0; h < c.block.heads; ++h) {
      const T skip = in.D[c.block.head + h];
      for (Index t = 0; t < c.count; ++t) {
        c.decays(t, h, &c.M(t, 0), [&](Index j) { return c.CB(t, j) * c.dt(j, h); });
        c.M(t, t) += skip;
        const T from_before = std::exp(c.l(t, h)), to_end = std::exp(c.l(last, h) - c.l(t, h)) * c.dt(t, h);
        detail::for_packs<T>(P, [&](Index p, auto lanes) {
          const Index at = h * P + p;
          detail::store(&y(t, at), Pack<T>(detail::load(&y(t, at), lanes) * from_before), lanes);
          detail::store(&weighted(t, at), Pack<T>(detail::load(&u(t, at), lanes) * to_end), lanes);
        });
      }
      detail::map(y.columns(h * P, P)).noalias() += detail::map(c.M) * detail::map(u.columns(h * P, P));
      detail::map(s.columns(h * P, P)) *= std::exp(c.l(last, h));
    }
    detail::map(s).noalias() += detail::map(c.B).transpose() * detail::map(weighted);
  }

  /// One chunk of the backward pass: s (N, W) is the state before it; at.g is taken back over the chunk.
  template <class T, class F>
  static void differentiate(const SsdInputs<T, F>& in, const Chunk<T>& c, Matrix<const F> s, Matrix<const T> d_y,
                            const Adjoint<T>& at, const SsdGradients<T, F>& out, Matrix<T> d_B, Matrix<T> d_C) {
    const Index P = c.block.P, heads = c.block.heads, last = c.count - 1;
    const Matrix<const T> u = in.u.slice(c.first, c.count).columns(c.block.channel(), c.block.channels());
    const auto part = [&](Matrix<T> m) { return m.slice(0, c.count); };
    const Matrix<T> v = part(at.v), e_dy = part(at.e_dy), work = part(at.work), d_v = part(at.d_v), d_l = part(at.d_l);
    const Matrix<T> d_CB(at.d_CB.data, c.count, c.count), K(at.K.data, c.count, c.count);
    const auto of_head = [&](auto m, Index h) { return detail::map(m.columns(h * P, P)); };

    for (Index h = 0; h < heads; ++h)
      for (Index t = 0; t < c.count; ++t) {
        const T e = std::exp(c.l(t, h)), dt = c.dt(t, h);
        detail::for_packs<T>(P, [&](Index p, auto lanes) {
          const Index i = h * P + p;
          detail::store(&e_dy(t, i), Pack<T>(detail::load(&d_y(t, i), lanes) * e), lanes);
          detail::store(&v(t, i), Pack<T>(detail::load(&u(t, i), lanes) * dt), lanes);
        });
      }

    // Through the state before the chunk.
    detail::map(d_C).noalias() = detail::map(e_dy) * detail::map(s).transpose();
    detail::map(work).noalias() = detail::map(c.C) * detail::map(s);
    for (Index h = 0; h < heads; ++h)
      detail::map(d_l).col(h) = (of_head(e_dy, h).array() * of_head(work, h).array()).rowwise().sum();
    detail::map(at.g_before).noalias() = detail::map(c.C).transpose() * detail::map(e_dy);

    // Through the state after it.
    detail::map(work).noalias() = detail::map(c.B) * detail::map(at.g);
    for (Index h = 0; h < heads; ++h) {
      for (Index t = 0; t < c.count; ++t) {
        const T f = std::exp(c.l(last, h) - c.l(t, h));
        Pack<T> product = {};
        detail::for_packs<T>(P, [&](Index p, auto lanes) {
          const Index i = h * P + p;
          const Pack<T> f_g = f * detail::load(&work(t, i), lanes);
          product += f_g * detail::load(&v(t, i), lanes);
          detail::store(&d_v(t, i), f_g, lanes);
          detail::store(&e_dy(t, i), Pack<T>(f * detail::load(&v(t, i), lanes)), lanes);  // now f v
        });
        const T d_f = detail::sum<T>(product);
        d_l(t, h) -= d_f;
        d_l(last, h) += d_f;
      }
      const T decay = std::exp(c.l(last, h));
      d_l(last, h) += decay * (of_head(s, h).array() * of_head(at.g, h).array()).sum();
      of_head(at.g_before, h) += decay * of_head(at.g, h);
    }
    detail::map(d_B).noalias() = detail::map(e_dy) * detail::map(at.g).transpose();
    copy(at.g_before, at.g);

    // Within the chunk.
    detail::map(c.CB).noalias() = detail::map(c.C) * detail::map(c.B).transpose();
    detail::map(d_CB).setZero();
    for (Index h = 0; h < heads; ++h) {
      for (Index t = 0; t < c.count; ++t) c.decays(t, h, &K(t, 0), [](Index) { return T(1); });
      detail::map(c.M).array() = detail::map(K).array() * detail::map(c.CB).array();
      of_head(d_v, h).noalias() += detail::map(c.M).transpose() * of_head(d_y, h);
      detail::map(c.M).noalias() = of_head(d_y, h) * of_head(v, h).transpose();
      detail::map(K).array() *= detail::map(c.M).array();
      detail::map(d_CB) += detail::map(K);
      detail::map(K).array() *= detail::map(c.CB).array();
      detail::map(d_l).col(h) += detail::map(K).rowwise().sum() - detail::map(K).colwise().sum().transpose();
    }
    detail::map(d_C).noalias() += detail::map(d_CB) * detail::map(c.B);
    detail::map(d_B).noalias() += detail::map(d_CB).transpose() * detail::map(c.C);

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
      Pack<T> through_v = {}, through_skip = {};
      detail::for_packs<T>(P, [&](Index p, auto lanes) {
        const Index i = h * P + p;
        const Pack<T> u_p = detail::load(&u(t, i), lanes), dy = detail::load(&d_y(t, i), lanes),
                      dv = detail::load(&d_v(t, i), lanes);
        through_v += dv * u_p;
        through_skip += dy * u_p;
        detail::store(&out.u(c.first + t, head * P + p), Pack<T>(dt * dv + skip * dy), lanes);
      });
      d_dtA += d_l(t, h);
      d_a += d_dtA * dt;
      d_skip += detail::sum<T>(through_skip);
      const T d_dt = c.a[h] * d_dtA + detail::sum<T>(through_v), x = in.delta(c.first + t, head) + in.dt_bias[head];
      const T slope = x > T(20) ? T(1) : T(1) / (T(1) + std::exp(-x));
      const T d_delta = dt > static_cast<T>(in.dt_min) ? d_dt * slope : T(0);
      out.delta(c.first + t, head) = d_delta;
      d_bias += d_delta;
    }
    out.A_log[head] += d_a * c.a[h];
    out.D[head] += d_skip;
    out.dt_bias[head] += d_bias;
  }
};

}  // namespace zamba
