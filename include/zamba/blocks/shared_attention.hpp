// SPDX-License-Identifier: MIT
// SharedAttention: Zamba's attention and MLP, whose weights several layers share.
//
//   h       = rms( concat[x, x0] )                       width 2d; x0 is the embedding, the stack's own input
//   q, k, v = h Wq^T, h Wk^T, h Wv^T                     heads of head_dim = 2d / n_heads; k, v may have fewer heads
//   a       = softmax( q k^T (head_dim / 2)^-1/2 ) v     causal; no position code
//   m       = rms( a Wo^T )
//   out     = ( gelu(m Wgate^T) * (m Wup^T) ) Wdown^T    no residual inside
//
// Source: Zamba (arXiv 2405.16712), section 2 and figure 1.
// Each use has key/value caches of its own, so a State belongs to a use, while Parameters exist once per shared copy.
#pragma once

#include <zamba/block.hpp>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/gated_activation.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/rms_norm.hpp>

namespace zamba {

/// Sizes of a SharedAttention.
struct SharedAttentionConfig {
  Index d_model;
  Index n_heads = 1;
  Index n_kv_heads = 0;  // 0: n_heads
  Index d_ff = 0;        // 0: 4 d_model
  bool rope = false;
  double rope_theta = 10000;
  Index mlp_adapter_rank = 0;  // 0: none
  Index qkv_adapter_rank = 0;  // 0: none
  double softmax_scale = 0;    // 0: (head_dim / 2)^-1/2
  double norm_eps = 1e-5;

  constexpr Index kv_heads() const { return n_kv_heads > 0 ? n_kv_heads : n_heads; }
  constexpr Index head_dim() const { return 2 * d_model / n_heads; }
  constexpr Index ff() const { return d_ff > 0 ? d_ff : 4 * d_model; }
};

template <SharedAttentionConfig C>
struct SharedAttention {
  static_assert(detail::at_least<C.d_model, 1> && detail::at_least<C.n_heads, 1>,
                "zamba::SharedAttentionConfig: d_model and n_heads must be positive");
  static_assert(detail::divides<2 * C.d_model, C.n_heads>,
                "zamba::SharedAttentionConfig: 2 * d_model must be a multiple of n_heads");
  static_assert(detail::divides<C.n_heads, C.kv_heads()>,
                "zamba::SharedAttentionConfig: n_heads must be a multiple of n_kv_heads");
  static_assert(
      !C.rope && C.mlp_adapter_rank == 0 && C.qkv_adapter_rank == 0,
      "zamba::SharedAttentionConfig: rope and adapters are not available yet; leave rope false and the ranks 0");

  /// Applied by a stack to concat[x, x0], outside the residual stream.
  static constexpr bool shared = true;
  static constexpr SharedAttentionConfig config = C;
  static constexpr Index d_model = C.d_model, width = 2 * C.d_model, head_dim = C.head_dim(),
                         q_width = C.n_heads * head_dim, kv_width = C.kv_heads() * head_dim, d_ff = C.ff();

  template <class W, class F>
  struct Parameters {
    Vector<F> input_norm;   // (2d)
    Matrix<W> q_proj;       // (heads head_dim, 2d)
    Matrix<W> k_proj;       // (kv_heads head_dim, 2d)
    Matrix<W> v_proj;       // (kv_heads head_dim, 2d)
    Matrix<W> o_proj;       // (d, heads head_dim)
    Vector<F> pre_ff_norm;  // (d)
    Matrix<W> gate_proj;    // (d_ff, d)
    Matrix<W> up_proj;      // (d_ff, d)
    Matrix<W> down_proj;    // (d, d_ff)
  };

  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("input_norm.weight", p.input_norm, {{width}}, constant(1), Decay::no);
    visit("q_proj.weight", p.q_proj, {{q_width, width}}, normal(0.02));
    visit("k_proj.weight", p.k_proj, {{kv_width, width}}, normal(0.02));
    visit("v_proj.weight", p.v_proj, {{kv_width, width}}, normal(0.02));
    visit("o_proj.weight", p.o_proj, {{d_model, q_width}}, normal(0.02));
    visit("pre_ff_norm.weight", p.pre_ff_norm, {{d_model}}, constant(1), Decay::no);
    visit("gate_proj.weight", p.gate_proj, {{d_ff, d_model}}, normal(0.02));
    visit("up_proj.weight", p.up_proj, {{d_ff, d_model}}, normal(0.02));
    visit("down_proj.weight", p.down_proj, {{d_model, d_ff}}, normal(0.02));
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
    Vector<F> input_rstd, ff_rstd;  // (tokens)
    Matrix<A> h;                    // (tokens, 2d)
    Matrix<A> q, k, v;              // (tokens, heads head_dim)
    Matrix<A> a;                    // (tokens, heads head_dim)
    Matrix<F> lse;                  // (tokens, heads)
    Matrix<A> o, m;                 // (tokens, d) before and after the second norm
    Matrix<A> gate, up, gated;      // (tokens, d_ff)
  };

  /// io.x and io.t are the two halves of the input, the stream and the embedding x0; io.out must be neither.
  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Stream<A>& io,
                             const Sequences& sequences, const State<S, F>& state, Keep) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    Saved<A, F> s;
    s.input_rstd = arena.template tensor<F>(tokens);
    s.ff_rstd = arena.template tensor<F>(tokens);
    s.h = arena.template tensor<A>(tokens, width);
    s.q = arena.template tensor<A>(tokens, q_width);
    s.k = arena.template tensor<A>(tokens, kv_width);
    s.v = arena.template tensor<A>(tokens, kv_width);
    s.a = arena.template tensor<A>(tokens, q_width);
    s.lse = arena.template tensor<F>(tokens, C.n_heads);
    s.o = arena.template tensor<A>(tokens, d_model);
    s.m = arena.template tensor<A>(tokens, d_model);
    s.gate = arena.template tensor<A>(tokens, d_ff);
    s.up = arena.template tensor<A>(tokens, d_ff);
    s.gated = arena.template tensor<A>(tokens, d_ff);

    rms_norm_concat(ctx, io.x, io.t, p.input_norm, C.norm_eps, s.h, s.input_rstd);
    linear(ctx, s.h, p.q_proj, s.q);
    linear(ctx, s.h, p.k_proj, s.k);
    linear(ctx, s.h, p.v_proj, s.v);
    attention(ctx, shape(), s.q, s.k, s.v, sequences, state.keys, state.values, s.a, s.lse);
    linear(ctx, s.a, p.o_proj, s.o);
    rms_norm(ctx, s.o, {}, p.pre_ff_norm, C.norm_eps, s.m, s.ff_rstd);
    linear(ctx, s.m, p.gate_proj, s.gate);
    linear(ctx, s.m, p.up_proj, s.up);
    gated_activation(ctx, Activation::gelu, s.gate, s.up, s.gated);
    linear(ctx, s.gated, p.down_proj, io.out);
    return s;
  }

  /// d_out: the gradient of out. d_x and d_x0 are added to. d_state as in Block.
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& s, const Stream<A>& io, std::type_identity_t<Matrix<const A>> d_out,
                       Matrix<A> d_x, Matrix<A> d_x0, const Sequences& sequences, const State<S, F>& state,
                       const State<F, F>& d_state) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    ArenaScope scope(arena);
    auto d_h = arena.template tensor<A>(tokens, width);
    auto d_q = arena.template tensor<A>(tokens, q_width);
    auto d_k = arena.template tensor<A>(tokens, kv_width);
    auto d_v = arena.template tensor<A>(tokens, kv_width);
    auto d_a = arena.template tensor<A>(tokens, q_width);
    auto d_o = arena.template tensor<A>(tokens, d_model);
    auto d_m = arena.template tensor<A>(tokens, d_model);
    auto d_gate = arena.template tensor<A>(tokens, d_ff);
    auto d_up = arena.template tensor<A>(tokens, d_ff);
    auto d_gated = arena.template tensor<A>(tokens, d_ff);

    linear_backward(ctx, d_out, s.gated, p.down_proj, d_gated, Accumulate::no, d_p.down_proj);
    gated_activation_backward(ctx, Activation::gelu, d_gated, s.gate, s.up, d_gate, d_up);
    linear_backward(ctx, d_up, s.m, p.up_proj, d_m, Accumulate::no, d_p.up_proj);
    linear_backward(ctx, d_gate, s.m, p.gate_proj, d_m, Accumulate::yes, d_p.gate_proj);
    ctx.zero(d_o);
    rms_norm_backward(ctx, d_m, s.o, {}, p.pre_ff_norm, s.ff_rstd, d_o, {}, d_p.pre_ff_norm);
    linear_backward(ctx, d_o, s.a, p.o_proj, d_a, Accumulate::no, d_p.o_proj);
    attention_backward(ctx, shape(), d_a, s.q, s.k, s.v, sequences, state.keys, state.values, s.a, s.lse, d_q, d_k, d_v,
                       d_state.keys, d_state.values);
    linear_backward(ctx, d_q, s.h, p.q_proj, d_h, Accumulate::no, d_p.q_proj);
    linear_backward(ctx, d_k, s.h, p.k_proj, d_h, Accumulate::yes, d_p.k_proj);
    linear_backward(ctx, d_v, s.h, p.v_proj, d_h, Accumulate::yes, d_p.v_proj);
    rms_norm_concat_backward(ctx, d_h, io.x, io.t, p.input_norm, s.input_rstd, d_x, d_x0, d_p.input_norm);
  }

 private:
  static AttentionShape shape() {
    const double scale = C.softmax_scale > 0 ? C.softmax_scale : std::pow(0.5 * static_cast<double>(head_dim), -0.5);
    return {C.n_heads, C.kv_heads(), head_dim, scale};
  }
};

}  // namespace zamba
