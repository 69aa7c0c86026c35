// SPDX-License-Identifier: MIT
// The backward pass of ssd on the CPU, chunk by chunk, from a row's last to its first. A task owns neighbouring heads
// of a group over all rows, so that parameter gradients have one writer. With g the gradient of the state after a
// chunk, s the state before it, M = K * (C B^T), l_t = log e_t, so that K_tj = exp(l_t - l_j), and what else
// ops/ssd.hpp names:
//
//   dC       = (e dy) s^T + dCB B                         dCB = sum over heads of K * (dy v^T)
//   dB       = (f v) g^T + dCB^T C
//   dv       = f (B g) + M^T dy
//   g_before = e_last g + C^T (e dy)
//   dl         each of e, f and K is its own derivative;  d(dt A)_j = sum_{t >= j} dl_t
//
// Inputs and Gradients are SsdInputs and SsdGradients.
#pragma once

#include <algorithm>
#include <cmath>

#include <zamba/context.hpp>
#include <zamba/kernel/add_parts.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/ops/ssd/chunk.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Memory of a task. W: its channels.
template <class T>
struct SsdAdjoint {
  Matrix<T> g, g_before;         // (N, W): the gradient of the state after and before the chunk
  Matrix<T> v, e_dy, work, d_v;  // (chunk, W)
  Matrix<T> d_CB;                // (chunk, chunk)
  Matrix<T> K;                   // (chunk, chunk), its rows padded
  Matrix<T> d_l;                 // (chunk, heads)
  T* products;                   // scratch of add_product

  static Index size(Index chunk, const SsdBlocks& blocks) {
    const Index W = blocks.most_channels();
    return products_of(chunk, blocks.N, W, blocks.P) + 2 * padded_to_line(blocks.N * W) +
           4 * padded_to_line(chunk * W) + padded_to_line(chunk * chunk) + chunk * padded_to_line(chunk) +
           padded_to_line(chunk * blocks.heads);
  }
  static Index products_of(Index chunk, Index N, Index W, Index P) {
    const auto of = [](Index rows, Index depth, Index cols) { return product_scratch<T>(rows, depth, cols); };
    return std::max({of(chunk, W, N), of(chunk, N, W), of(N, chunk, W), of(chunk, N, chunk), of(chunk, chunk, N),
                     of(chunk, chunk, P), of(chunk, P, chunk)});
  }
  SsdAdjoint(const SsdBlock& block, Index N, Index chunk, T*& memory)
      : g(take_line(memory, N * block.channels()), N, block.channels()),
        g_before(take_line(memory, N * block.channels()), N, block.channels()),
        v(take_line(memory, chunk * block.channels()), chunk, block.channels()),
        e_dy(take_line(memory, chunk * block.channels()), chunk, block.channels()),
        work(take_line(memory, chunk * block.channels()), chunk, block.channels()),
        d_v(take_line(memory, chunk * block.channels()), chunk, block.channels()),
        d_CB(take_line(memory, chunk * chunk), chunk, chunk),
        K(take_line(memory, chunk * padded_to_line(chunk)), chunk, padded_to_line(chunk)),
        d_l(take_line(memory, chunk * block.heads), chunk, block.heads),
        products(take_line(memory, products_of(chunk, N, block.channels(), block.P))) {}

  /// The same memory for a chunk of `count` tokens.
  SsdAdjoint of_tokens(Index count) const {
    SsdAdjoint part = *this;
    for (Matrix<T>* m : {&part.v, &part.e_dy, &part.work, &part.d_v, &part.d_l}) *m = m->slice(0, count);
    part.d_CB = Matrix<T>(d_CB.data, count, count);
    part.K = Matrix<T>(K.data, count, padded_to_line(count));
    return part;
  }
};

template <class T>
struct SsdBackward {
  using Chunk = SsdChunk<T>;
  using Adjoint = SsdAdjoint<T>;

  struct Room {
    Tensor<T, 3> partial;  // (tasks, tokens, 2 N): each task's dB and dC
    Matrix<T> memory;      // (threads, ...)
  };
  template <class Ctx>
  static Room room(Ctx& ctx, const SsdBlocks& blocks, Index tokens, Index chunk) {
    return {ctx.arena().template tensor<T>(blocks.count(), tokens, 2 * blocks.N),
            ctx.arena().template tensor<T>(Index{ctx.threads()},
                                           Chunk::size(chunk, blocks) + Adjoint::size(chunk, blocks))};
  }

  template <class Inputs, class Gradients>
  static void run(Context<cpu>& ctx, Matrix<const T> d_y, const Inputs& in, const Sequences& sequences,
                  Tensor<const T, 3> checkpoints, const Gradients& out, Tensor<T, 3> d_state, Index chunk) {
    const SsdBlocks blocks(in);
    const Index N = blocks.N;
    ArenaScope scope(ctx.arena());
    const auto [partial, memory] = room(ctx, blocks, sequences.tokens, chunk);
    ctx.parallel_for(blocks.count(), [&, partial = partial, memory = memory](Index task, int worker) {
      const SsdBlock block = blocks[task];
      T* scratch = memory[worker].data;
      const Adjoint adjoint(block, N, chunk, scratch);
      for (Index row = 0; row < sequences.rows; ++row) {
        const Index begin = sequences.offsets[row], length = sequences.length(row);
        if (length == 0) continue;
        if (d_state)
          copy_rows(d_state[row].columns(block.channel(), block.channels()), adjoint.g);
        else
          std::fill_n(adjoint.g.data, adjoint.g.size(), T(0));
        for (Index k = (length - 1) / chunk; k >= 0; --k) {
          const Chunk c(in, block, begin + k * chunk, std::min(chunk, length - k * chunk), scratch);
          c.prepare_products(in, adjoint.products);
          const auto s = checkpoints[begin / chunk + row + k].columns(block.channel(), block.channels());
          const Matrix<T> d_BC = partial[task].slice(c.first, c.count);
          differentiate(in, c, s, d_y.slice(c.first, c.count).columns(block.channel(), block.channels()),
                        adjoint.of_tokens(c.count), out, d_BC.columns(0, N), d_BC.columns(N, N));
        }
        if (!d_state) continue;
        // A row that began from zero has no initial state to receive a gradient.
        if (sequences.start(row) == 0) std::fill_n(adjoint.g.data, adjoint.g.size(), T(0));
        copy_rows(adjoint.g, d_state[row].columns(block.channel(), block.channels()));
      }
    });
    add_parts(ctx, blocks.per_group, partial, out.B, out.C);  // of a group, those of its tasks
  }

 private:
  /// One chunk of n tokens: s (N, W) is the state before it, d_y (n, W), d_B and d_C (n, N) the task's part; at.g is
  /// taken back over the chunk.
  template <class Inputs, class Gradients>
  static void differentiate(const Inputs& in, const Chunk& c, Matrix<const T> s, Matrix<const T> d_y, const Adjoint& at,
                            const Gradients& out, Matrix<T> d_B, Matrix<T> d_C) {
    const Matrix<const T> u = in.u.slice(c.first, c.count).columns(c.block.channel(), c.block.channels());
    scale_inputs(c, u, d_y, at);
    through_state_before(c, s, at, d_C);
    through_state_after(c, s, at, d_B);
    within_chunk(c, d_y, at, d_B, d_C);
    for (Index h = 0; h < c.block.heads; ++h) finish_head(in, c, h, u, d_y, at.d_v, at.d_l, out);
  }

  /// e dy, and v = dt u.
  static void scale_inputs(const Chunk& c, Matrix<const T> u, Matrix<const T> d_y, const Adjoint& at) {
    const Index P = c.block.P;
    const Matrix<T> v = at.v, e_dy = at.e_dy;
    for (Index h = 0; h < c.block.heads; ++h)
      for (Index t = 0; t < c.count; ++t) {
        const T e = c.e(t, h), dt = c.dt(t, h);
        for_packs<T>(P, [&](Index p, auto lanes) {
          const Index i = h * P + p;
          store(&e_dy(t, i), Pack<T>(load(&d_y(t, i), lanes) * e), lanes);
          store(&v(t, i), Pack<T>(load(&u(t, i), lanes) * dt), lanes);
        });
      }
  }

  /// dC = (e dy) s^T, dl of e, and g_before = C^T (e dy).
  static void through_state_before(const Chunk& c, Matrix<const T> s, const Adjoint& at, Matrix<T> d_C) {
    set_product(d_C, at.e_dy, transposed(s), at.products);
    set_product(at.work, c.C, s, at.products);
    for (Index h = 0; h < c.block.heads; ++h)
      map(at.d_l).col(h) = (of_head(c, at.e_dy, h).array() * of_head(c, at.work, h).array()).rowwise().sum();
    set_product(at.g_before, transposed(c.C), at.e_dy, at.products);
  }

  /// dv = f (B g), dB = (f v) g^T, dl of f and of e_last, g_before += e_last g, and the state's gradient is g_before.
  static void through_state_after(const Chunk& c, Matrix<const T> s, const Adjoint& at, Matrix<T> d_B) {
    const Index P = c.block.P, last = c.count - 1;
    const Matrix<T> v = at.v, work = at.work, d_v = at.d_v, d_l = at.d_l, f_v = at.e_dy;  // e dy has been used
    set_product(work, c.B, at.g, at.products);
    for (Index h = 0; h < c.block.heads; ++h) {
      for (Index t = 0; t < c.count; ++t) {
        const T f = c.f(t, h);
        Pack<T> product = zeros<T>();
        for_packs<T>(P, [&](Index p, auto lanes) {
          const Index i = h * P + p;
          const Pack<T> f_g = f * load(&work(t, i), lanes);
          product += f_g * load(&v(t, i), lanes);
          store(&d_v(t, i), f_g, lanes);
          store(&f_v(t, i), Pack<T>(f * load(&v(t, i), lanes)), lanes);
        });
        const T d_f = sum<T>(product);
        d_l(t, h) -= d_f;
        d_l(last, h) += d_f;
      }
      const T decay = c.e(last, h);
      d_l(last, h) += decay * (of_head(c, s, h).array() * of_head(c, at.g, h).array()).sum();
      of_head(c, at.g_before, h) += decay * of_head(c, at.g, h);
    }
    set_product(d_B, f_v, transposed(at.g), at.products);
    copy_rows(at.g_before, at.g);
  }

  /// dv += M^T dy, dCB = sum over heads of K * (dy v^T), dC += dCB B, dB += dCB^T C, and dl of K.
  static void within_chunk(const Chunk& c, Matrix<const T> d_y, const Adjoint& at, Matrix<T> d_B, Matrix<T> d_C) {
    const Index P = c.block.P;
    const Matrix<T> K = at.K.columns(0, c.count), CB = c.CB.columns(0, c.count), M = c.M.columns(0, c.count);
    map(at.d_CB).setZero();
    for (Index h = 0; h < c.block.heads; ++h) {
      c.decays(h, at.K);
      map(M).array() = map(K).array() * map(CB).array();
      const Matrix<const T> d_y_h = d_y.columns(h * P, P);
      add_product(at.d_v.columns(h * P, P), transposed(M), d_y_h, at.products);
      set_product(M, d_y_h, transposed(at.v.columns(h * P, P)), at.products);
      map(K).array() *= map(M).array();
      map(at.d_CB) += map(K);
      map(K).array() *= map(CB).array();
      map(at.d_l).col(h) += map(K).rowwise().sum() - map(K).colwise().sum().transpose();
    }
    add_product(d_C, at.d_CB, c.B, at.products);
    add_product(d_B, transposed(at.d_CB), c.C, at.products);
  }

  /// From d_v and d_l of head h to the gradients of u, delta and the head's parameters.
  template <class Inputs, class Gradients>
  static void finish_head(const Inputs& in, const Chunk& c, Index h, Matrix<const T> u, Matrix<const T> d_y,
                          Matrix<T> d_v, Matrix<T> d_l, const Gradients& out) {
    const Index P = c.block.P, head = c.block.head + h;
    const T skip = in.D[head];
    T d_dtA = 0, d_a = 0, d_skip = 0, d_bias = 0;
    for (Index t = c.count - 1; t >= 0; --t) {
      const T dt = c.dt(t, h);
      Pack<T> through_v = zeros<T>(), through_skip = through_v;
      for_packs<T>(P, [&](Index p, auto lanes) {
        const Index i = h * P + p;
        const Pack<T> u_p = load(&u(t, i), lanes), dy = load(&d_y(t, i), lanes), dv = load(&d_v(t, i), lanes);
        through_v += dv * u_p;
        through_skip += dy * u_p;
        store(&out.u(c.first + t, head * P + p), Pack<T>(dt * dv + skip * dy), lanes);
      });
      d_dtA += d_l(t, h);
      d_a += d_dtA * dt;
      d_skip += sum<T>(through_skip);
      const T d_dt = c.A[h] * d_dtA + sum<T>(through_v), x = in.delta(c.first + t, head) + in.dt_bias[head];
      const T slope = x > T(20) ? T(1) : T(1) / (T(1) + std::exp(-x));
      const T d_delta = dt > static_cast<T>(in.dt_min) ? d_dt * slope : T(0);
      out.delta(c.first + t, head) = d_delta;
      d_bias += d_delta;
    }
    out.A_log[head] += d_a * c.A[h];
    out.D[head] += d_skip;
    out.dt_bias[head] += d_bias;
  }

  static auto of_head(const Chunk& c, auto m, Index h) { return map(m.columns(h * c.block.P, c.block.P)); }
};

}  // namespace zamba::kernel
