// SPDX-License-Identifier: MIT
// TransformerBlock: the plain transformer layer of Llama, for baselines and variants.
//
//   h       = rms(x + t)
//   q, k, v = h Wq^T, h Wk^T, h Wv^T                     heads of head_dim = d / n_heads; k, v may have fewer heads
//   a       = softmax( rope(q) rope(k)^T head_dim^-1/2 ) v    causal
//   y       = x + a Wo^T
//   [g, u]  = rms(y) Wgate_up^T                          two halves of d_ff, the gate first
//   out     = y + ( silu(g) * u ) Wdown^T
//
// Source: Llama 2 (arXiv 2307.09288), section 2.2; rope: RoFormer (arXiv 2104.09864).
// A second input t enters the attention only: the MLP reads the stream. The cache holds keys that are turned already.
#pragma once

#include <cmath>

#include <zamba/block.hpp>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/gated_activation.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/ops/rope.hpp>

namespace zamba {

/// Sizes of a TransformerBlock.
struct TransformerConfig {
  Index d_model;
  Index n_heads = 1;
  Index n_kv_heads = 0;  // 0: n_heads
  Index d_ff = 0;        // 0: 4 d_model
  double rope_theta = 10000;
  double norm_eps = 1e-5;
  double init_std = 0;  // of normal initial weights; 0: by fan-in

  constexpr Index kv_heads() const { return n_kv_heads > 0 ? n_kv_heads : n_heads; }
  constexpr Index head_dim() const { return d_model / n_heads; }
  constexpr Index ff() const { return d_ff > 0 ? d_ff : 4 * d_model; }
};

template <TransformerConfig C>
struct TransformerBlock {
  static_assert(detail::at_least<C.d_model, 1> && detail::at_least<C.n_heads, 1>,
                "zamba::TransformerConfig: d_model and n_heads must be positive");
  static_assert(detail::divides<C.d_model, 2 * C.n_heads>,
                "zamba::TransformerConfig: d_model must be an even multiple of n_heads, because rope turns pairs");
  static_assert(detail::divides<C.n_heads, C.kv_heads()>,
                "zamba::TransformerConfig: n_heads must be a multiple of n_kv_heads");

  static constexpr TransformerConfig config = C;
  static constexpr bool by_operators = true;
  static constexpr Index d_model = C.d_model, head_dim = C.head_dim(), kv_width = C.kv_heads() * head_dim,
                         d_ff = C.ff();
  static constexpr double norm_eps = C.norm_eps, init_std = C.init_std;

  template <class W, class F>
  struct Parameters {
    Vector<F> norm;       // (d)
    Weight<W> q_proj;     // (d, d)
    Weight<W> k_proj;     // (kv_heads head_dim, d)
    Weight<W> v_proj;     // (kv_heads head_dim, d)
    Weight<W> o_proj;     // (d, d)
    Vector<F> ff_norm;    // (d)
    Weight<W> gate_up;    // (2 d_ff, d): gate, then up
    Weight<W> down_proj;  // (d, d_ff)
  };

  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("norm.weight", p.norm, {{d_model}}, constant(1), Decay::no);
    visit("q_proj.weight", p.q_proj, {{d_model, d_model}}, fan_in(d_model, init_std));
    visit("k_proj.weight", p.k_proj, {{kv_width, d_model}}, fan_in(d_model, init_std));
    visit("v_proj.weight", p.v_proj, {{kv_width, d_model}}, fan_in(d_model, init_std));
    visit("o_proj.weight", p.o_proj, {{d_model, d_model}}, residual_fan_in(d_model, init_std));
    visit("ff_norm.weight", p.ff_norm, {{d_model}}, constant(1), Decay::no);
    visit("gate_up.weight", p.gate_up, {{2 * d_ff, d_model}}, fan_in(d_model, init_std));
    visit("down_proj.weight", p.down_proj, {{d_model, d_ff}}, residual_fan_in(d_ff, init_std));
  }

  template <class S, class F>
  struct State {
    Tensor<S, 3> keys;    // (rows, max_length, kv_heads head_dim)
    Tensor<S, 3> values;  // (rows, max_length, kv_heads head_dim)
  };

  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    visit.cache("keys", s.keys, kv_width);
    visit.cache("values", s.values, kv_width);
  }

  template <class A, class F>
  struct Saved {
    Vector<F> rstd, ff_rstd;  // (tokens)
    Matrix<A> h;              // (tokens, d); not with Keep::costly
    Matrix<A> q, k, v;        // (tokens, heads head_dim), turned
    Matrix<A> a;              // (tokens, d)
    Matrix<F> lse;            // (tokens, heads)
    Matrix<A> y, m;           // (tokens, d) before and after the second norm; m not with Keep::costly
    Matrix<A> gate_up;        // (tokens, 2 d_ff)
    Matrix<A> gated;          // (tokens, d_ff); not with Keep::costly
  };

  /// state: of the rows of `sequences`; empty views: every row starts at position 0 and leaves nothing.
  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>& state, Keep keep) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    Saved<A, F> s;
    s.rstd = arena.template tensor<F>(tokens);
    s.ff_rstd = arena.template tensor<F>(tokens);
    s.q = arena.template tensor<A>(tokens, d_model);
    s.k = arena.template tensor<A>(tokens, kv_width);
    s.v = arena.template tensor<A>(tokens, kv_width);
    s.a = arena.template tensor<A>(tokens, d_model);
    s.lse = arena.template tensor<F>(tokens, C.n_heads);
    s.y = arena.template tensor<A>(tokens, d_model);
    s.gate_up = arena.template tensor<A>(tokens, 2 * d_ff);
    const auto kept = arena.mark();
    s.h = arena.template tensor<A>(tokens, d_model);
    s.m = arena.template tensor<A>(tokens, d_model);
    s.gated = arena.template tensor<A>(tokens, d_ff);

    rms_norm(ctx, io.x, io.t, p.norm, C.norm_eps, s.h, s.rstd);
    linear(ctx, s.h, p.q_proj, s.q);
    linear(ctx, s.h, p.k_proj, s.k);
    linear(ctx, s.h, p.v_proj, s.v);
    rope(ctx, turned(C.n_heads), sequences, s.q);
    rope(ctx, turned(C.kv_heads()), sequences, s.k);
    attention(ctx, shape(), s.q, s.k, s.v, sequences, state.keys, state.values, s.a, s.lse);
    linear(ctx, s.a, p.o_proj, s.y, io.x);
    rms_norm(ctx, s.y, {}, p.ff_norm, C.norm_eps, s.m, s.ff_rstd);
    linear(ctx, s.m, p.gate_up, s.gate_up);
    gated_activation(ctx, Activation::silu, gate_of(s.gate_up), up_of(s.gate_up), s.gated);
    linear(ctx, s.gated, p.down_proj, io.out, s.y);
    if (keep == Keep::costly) {
      s.h = s.m = s.gated = {};
      arena.rewind(kept);
    }
    return s;
  }

  /// d: in, the gradient of out; out, that of x. d_t: receives the gradient of t, where t was given.
  /// d_state: in, the gradient of the state after this pass; out, that of the state before it. Empty views: none.
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       Saved<A, F> s, const ResidualIO<A>& io, Matrix<A> d, Matrix<A> d_t, const Sequences& sequences,
                       const State<S, F>& state, const State<F, F>& d_state) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    ArenaScope scope(arena);
    if (!s.h) compute_again(ctx, p, s, io);
    auto d_h = arena.template tensor<A>(tokens, d_model);
    auto d_q = arena.template tensor<A>(tokens, d_model);
    auto d_k = arena.template tensor<A>(tokens, kv_width);
    auto d_v = arena.template tensor<A>(tokens, kv_width);
    auto d_a = arena.template tensor<A>(tokens, d_model);
    auto d_m = arena.template tensor<A>(tokens, d_model);
    auto d_gate_up = arena.template tensor<A>(tokens, 2 * d_ff);
    auto d_gated = arena.template tensor<A>(tokens, d_ff);

    linear_backward(ctx, d, s.gated, p.down_proj, d_gated, Accumulate::no, d_p.down_proj);
    gated_activation_backward(ctx, Activation::silu, d_gated, gate_of(s.gate_up), up_of(s.gate_up), gate_of(d_gate_up),
                              up_of(d_gate_up));
    linear_backward(ctx, d_gate_up, s.m, p.gate_up, d_m, Accumulate::no, d_p.gate_up);
    rms_norm_backward(ctx, d_m, s.y, {}, p.ff_norm, s.ff_rstd, d, {}, d_p.ff_norm);  // d is now that of y
    linear_backward(ctx, d, s.a, p.o_proj, d_a, Accumulate::no, d_p.o_proj);
    attention_backward(ctx, shape(), d_a, s.q, s.k, s.v, sequences, state.keys, state.values, s.a, s.lse, d_q, d_k, d_v,
                       d_state.keys, d_state.values);
    rope_backward(ctx, turned(C.n_heads), sequences, d_q);
    rope_backward(ctx, turned(C.kv_heads()), sequences, d_k);
    linear_backward(ctx, d_q, s.h, p.q_proj, d_h, Accumulate::no, d_p.q_proj);
    linear_backward(ctx, d_k, s.h, p.k_proj, d_h, Accumulate::yes, d_p.k_proj);
    linear_backward(ctx, d_v, s.h, p.v_proj, d_h, Accumulate::yes, d_p.v_proj);
    rms_norm_backward(ctx, d_h, io.x, io.t, p.norm, s.rstd, d, d_t, d_p.norm);
  }

 private:
  /// What Keep::costly leaves out.
  template <class Device, class W, class F, class A>
  static void compute_again(Context<Device>& ctx, const Parameters<const W, const F>& p, Saved<A, F>& s,
                            const ResidualIO<A>& io) {
    auto& arena = ctx.arena();
    s.h = arena.template tensor<A>(s.y.rows(), d_model);
    s.m = arena.template tensor<A>(s.y.rows(), d_model);
    s.gated = arena.template tensor<A>(s.y.rows(), d_ff);
    rms_norm(ctx, io.x, io.t, p.norm, C.norm_eps, s.h, s.rstd);
    rms_norm(ctx, s.y, {}, p.ff_norm, C.norm_eps, s.m, s.ff_rstd);
    gated_activation(ctx, Activation::silu, gate_of(s.gate_up), up_of(s.gate_up), s.gated);
  }

  static AttentionShape shape() {
    return {C.n_heads, C.kv_heads(), head_dim, 1 / std::sqrt(static_cast<double>(head_dim))};
  }
  static RopeShape turned(Index heads) { return {heads, head_dim, C.rope_theta}; }

  template <class A>
  static Matrix<A> gate_of(Matrix<A> gate_up) {
    return gate_up.columns(0, d_ff);
  }
  template <class A>
  static Matrix<A> up_of(Matrix<A> gate_up) {
    return gate_up.columns(d_ff, d_ff);
  }
};

}  // namespace zamba
