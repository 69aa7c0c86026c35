// SPDX-License-Identifier: MIT
// SharedAttention: Zamba's attention and MLP, whose weights several layers share.
//
//   h          = rms( concat[x, x0] )                      width 2d; x0 is the embedding, the stack's own input
//   q, k, v    = h Wq^T, h Wk^T, h Wv^T                    heads of head_dim = 2d / n_heads; k, v may have fewer heads
//   q, k       = rope(q), rope(k)                          optional, over the whole head
//   a          = softmax( q k^T (head_dim / 2)^-1/2 ) v    causal
//   m          = rms( a Wo^T )
//   [gate, up] = m Wgate_up^T                              d_ff each
//   out        = ( gelu(gate) * up ) Wdown^T               no residual inside
//
// Source: Zamba (arXiv 2405.16712), section 2 and figure 1; rope and adapters: Zamba2 (arXiv 2411.15242), section 2.
// Each use has key/value caches of its own, so a State belongs to a use, while Parameters exist once per shared copy.
// A use may have adapters for itself: products of low rank added to Wq, Wk, Wv and Wgate_up. Caches hold keys as
// rope has turned them.
#pragma once

#include <cmath>

#include <zamba/block.hpp>
#include <zamba/blocks/low_rank_adapter.hpp>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/gated_activation.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/ops/rope.hpp>

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
  double context_stretch = 1;  // of rope: theta *= context_stretch^(head_dim / (head_dim - 2))
  double init_std = 0;         // of normal initial weights; 0: by fan-in
  // A context_stretch of 8 is the long context of Zamba2. No field of another type may follow: clang 14 misreads
  // template arguments that have padding both inside and at their end.

  constexpr Index kv_heads() const { return n_kv_heads > 0 ? n_kv_heads : n_heads; }
  constexpr Index head_dim() const { return 2 * d_model / n_heads; }
  constexpr Index ff() const { return d_ff > 0 ? d_ff : 4 * d_model; }
  double theta() const {
    const double size = static_cast<double>(head_dim());
    return context_stretch == 1 ? rope_theta : rope_theta * std::pow(context_stretch, size / (size - 2));
  }
};

template <SharedAttentionConfig C>
struct SharedAttention {
  static_assert(detail::at_least<C.d_model, 1> && detail::at_least<C.n_heads, 1>,
                "zamba::SharedAttentionConfig: d_model and n_heads must be positive");
  static_assert(detail::divides<2 * C.d_model, C.n_heads>,
                "zamba::SharedAttentionConfig: 2 * d_model must be a multiple of n_heads");
  static_assert(detail::divides<C.n_heads, C.kv_heads()>,
                "zamba::SharedAttentionConfig: n_heads must be a multiple of n_kv_heads");
  static_assert(!C.rope || detail::divides<C.head_dim(), 2>,
                "zamba::SharedAttentionConfig: rope turns pairs, so head_dim = 2 * d_model / n_heads must be even");
  static_assert(
      C.context_stretch == 1 || (C.context_stretch > 1 && C.rope && detail::at_least<C.head_dim(), 4>),
      "zamba::SharedAttentionConfig: context_stretch is 1, or above 1 with rope and a head_dim of at least 4");
  static_assert(detail::at_least<C.mlp_adapter_rank, 0> && detail::at_least<C.qkv_adapter_rank, 0>,
                "zamba::SharedAttentionConfig: the ranks of adapters must be 0 (none) or more");

  /// Applied by a stack to concat[x, x0], outside the residual stream.
  static constexpr bool shared = true;
  static constexpr SharedAttentionConfig config = C;
  static constexpr bool by_operators = true;
  static constexpr Index d_model = C.d_model, width = 2 * C.d_model, head_dim = C.head_dim(),
                         q_width = C.n_heads * head_dim, kv_width = C.kv_heads() * head_dim, d_ff = C.ff();

  template <class W, class F>
  struct Parameters {
    Vector<F> input_norm;   // (2d)
    Weight<W> q_proj;       // (heads head_dim, 2d)
    Weight<W> k_proj;       // (kv_heads head_dim, 2d)
    Weight<W> v_proj;       // (kv_heads head_dim, 2d)
    Weight<W> o_proj;       // (d, heads head_dim)
    Vector<F> pre_ff_norm;  // (d)
    Weight<W> gate_up;      // (2 d_ff, d): gate, then up
    Weight<W> down_proj;    // (d, d_ff)
  };

  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("input_norm.weight", p.input_norm, {{width}}, constant(1), Decay::no);
    visit("q_proj.weight", p.q_proj, {{q_width, width}}, fan_in(width, C.init_std));
    visit("k_proj.weight", p.k_proj, {{kv_width, width}}, fan_in(width, C.init_std));
    visit("v_proj.weight", p.v_proj, {{kv_width, width}}, fan_in(width, C.init_std));
    visit("o_proj.weight", p.o_proj, {{d_model, q_width}}, fan_in(q_width, C.init_std));
    visit("pre_ff_norm.weight", p.pre_ff_norm, {{d_model}}, constant(1), Decay::no);
    visit("gate_up.weight", p.gate_up, {{2 * d_ff, d_model}}, fan_in(d_model, C.init_std));
    visit("down_proj.weight", p.down_proj, {{d_model, d_ff}}, fan_in(d_ff, C.init_std));
  }

  using QAdapter = LowRankAdapter<width, q_width, C.qkv_adapter_rank>;
  using KvAdapter = LowRankAdapter<width, kv_width, C.qkv_adapter_rank>;
  using MlpAdapter = LowRankAdapter<d_model, 2 * d_ff, C.mlp_adapter_rank>;

  /// What each use has for itself.
  template <class W, class F>
  struct UseParameters {
    typename QAdapter::template Parameters<W> q_adapter;
    typename KvAdapter::template Parameters<W> k_adapter, v_adapter;
    typename MlpAdapter::template Parameters<W> gate_up_adapter;
  };

  template <class Params, class Visit>
  static constexpr void visit_use_parameters(Params& p, Visit visit) {
    QAdapter::visit_parameters(p.q_adapter, visit.scope("q_adapter"), C.init_std);
    KvAdapter::visit_parameters(p.k_adapter, visit.scope("k_adapter"), C.init_std);
    KvAdapter::visit_parameters(p.v_adapter, visit.scope("v_adapter"), C.init_std);
    MlpAdapter::visit_parameters(p.gate_up_adapter, visit.scope("gate_up_adapter"), C.init_std);
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
    Matrix<A> h;                    // (tokens, 2d); not with Keep::costly
    Matrix<A> q, k, v;              // (tokens, heads head_dim)
    Matrix<A> a;                    // (tokens, heads head_dim)
    Matrix<F> lse;                  // (tokens, heads)
    Matrix<A> o, m;                 // (tokens, d) before and after the second norm; m not with Keep::costly
    Matrix<A> gate_up;              // (tokens, 2 d_ff)
    Matrix<A> gated;                // (tokens, d_ff); not with Keep::costly
    Matrix<A> q_low, k_low, v_low;  // (tokens, rank) of the adapters
    Matrix<A> gate_up_low;          // (tokens, rank)
  };

  /// io.x and io.t are the two halves of the input, the stream and the embedding x0; io.out must be neither.
  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p,
                             const UseParameters<const W, const F>& use, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>& state, Keep keep) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    Saved<A, F> s;
    s.input_rstd = arena.template tensor<F>(tokens);
    s.ff_rstd = arena.template tensor<F>(tokens);
    s.q = arena.template tensor<A>(tokens, q_width);
    s.k = arena.template tensor<A>(tokens, kv_width);
    s.v = arena.template tensor<A>(tokens, kv_width);
    s.a = arena.template tensor<A>(tokens, q_width);
    s.lse = arena.template tensor<F>(tokens, C.n_heads);
    s.o = arena.template tensor<A>(tokens, d_model);
    s.gate_up = arena.template tensor<A>(tokens, 2 * d_ff);
    s.q_low = QAdapter::template room<A>(arena, tokens);
    s.k_low = KvAdapter::template room<A>(arena, tokens);
    s.v_low = KvAdapter::template room<A>(arena, tokens);
    s.gate_up_low = MlpAdapter::template room<A>(arena, tokens);
    const auto kept = arena.mark();
    s.h = arena.template tensor<A>(tokens, width);
    s.m = arena.template tensor<A>(tokens, d_model);
    s.gated = arena.template tensor<A>(tokens, d_ff);

    rms_norm_concat(ctx, io.x, io.t, p.input_norm, C.norm_eps, s.h, s.input_rstd);
    linear(ctx, s.h, p.q_proj, s.q);
    linear(ctx, s.h, p.k_proj, s.k);
    linear(ctx, s.h, p.v_proj, s.v);
    QAdapter::forward(ctx, use.q_adapter, s.h, s.q_low, s.q);
    KvAdapter::forward(ctx, use.k_adapter, s.h, s.k_low, s.k);
    KvAdapter::forward(ctx, use.v_adapter, s.h, s.v_low, s.v);
    if (C.rope) {
      rope(ctx, turn(C.n_heads), sequences, s.q);
      rope(ctx, turn(C.kv_heads()), sequences, s.k);
    }
    attention(ctx, shape(), s.q, s.k, s.v, sequences, state.keys, state.values, s.a, s.lse);
    linear(ctx, s.a, p.o_proj, s.o);
    rms_norm(ctx, s.o, {}, p.pre_ff_norm, C.norm_eps, s.m, s.ff_rstd);
    linear(ctx, s.m, p.gate_up, s.gate_up);
    MlpAdapter::forward(ctx, use.gate_up_adapter, s.m, s.gate_up_low, s.gate_up);
    gated_activation(ctx, Activation::gelu, gate(s.gate_up), up(s.gate_up), s.gated);
    linear(ctx, s.gated, p.down_proj, io.out);
    if (keep == Keep::costly) {
      s.h = s.m = s.gated = {};
      arena.rewind(kept);
    }
    return s;
  }

  /// d_out: the gradient of out. d_x and d_x0 are added to. d_state as in Block.
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p,
                       const UseParameters<const W, const F>& use, const Parameters<F, F>& d_p,
                       const UseParameters<F, F>& d_use, Saved<A, F> s, const ResidualIO<A>& io,
                       std::type_identity_t<Matrix<const A>> d_out, Matrix<A> d_x, Matrix<A> d_x0,
                       const Sequences& sequences, const State<S, F>& state, const State<F, F>& d_state) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    ArenaScope scope(arena);
    if (!s.h) compute_again(ctx, p, s, io);
    auto d_h = arena.template tensor<A>(tokens, width);
    auto d_q = arena.template tensor<A>(tokens, q_width);
    auto d_k = arena.template tensor<A>(tokens, kv_width);
    auto d_v = arena.template tensor<A>(tokens, kv_width);
    auto d_a = arena.template tensor<A>(tokens, q_width);
    auto d_o = arena.template tensor<A>(tokens, d_model);
    auto d_m = arena.template tensor<A>(tokens, d_model);
    auto d_gate_up = arena.template tensor<A>(tokens, 2 * d_ff);
    auto d_gated = arena.template tensor<A>(tokens, d_ff);

    linear_backward(ctx, d_out, s.gated, p.down_proj, d_gated, Accumulate::no, d_p.down_proj);
    gated_activation_backward(ctx, Activation::gelu, d_gated, gate(s.gate_up), up(s.gate_up), gate(d_gate_up),
                              up(d_gate_up));
    linear_backward(ctx, d_gate_up, s.m, p.gate_up, d_m, Accumulate::no, d_p.gate_up);
    MlpAdapter::backward(ctx, use.gate_up_adapter, d_use.gate_up_adapter, s.m, s.gate_up_low, d_gate_up, d_m);
    ctx.zero(d_o);
    rms_norm_backward(ctx, d_m, s.o, {}, p.pre_ff_norm, s.ff_rstd, d_o, {}, d_p.pre_ff_norm);
    linear_backward(ctx, d_o, s.a, p.o_proj, d_a, Accumulate::no, d_p.o_proj);
    attention_backward(ctx, shape(), d_a, s.q, s.k, s.v, sequences, state.keys, state.values, s.a, s.lse, d_q, d_k, d_v,
                       d_state.keys, d_state.values);
    if (C.rope) {
      rope_backward(ctx, turn(C.n_heads), sequences, d_q);
      rope_backward(ctx, turn(C.kv_heads()), sequences, d_k);
    }
    linear_backward(ctx, d_q, s.h, p.q_proj, d_h, Accumulate::no, d_p.q_proj);
    linear_backward(ctx, d_k, s.h, p.k_proj, d_h, Accumulate::yes, d_p.k_proj);
    linear_backward(ctx, d_v, s.h, p.v_proj, d_h, Accumulate::yes, d_p.v_proj);
    QAdapter::backward(ctx, use.q_adapter, d_use.q_adapter, s.h, s.q_low, d_q, d_h);
    KvAdapter::backward(ctx, use.k_adapter, d_use.k_adapter, s.h, s.k_low, d_k, d_h);
    KvAdapter::backward(ctx, use.v_adapter, d_use.v_adapter, s.h, s.v_low, d_v, d_h);
    rms_norm_concat_backward(ctx, d_h, io.x, io.t, p.input_norm, s.input_rstd, d_x, d_x0, d_p.input_norm);
  }

 private:
  /// What Keep::costly leaves out.
  template <class Device, class W, class F, class A>
  static void compute_again(Context<Device>& ctx, const Parameters<const W, const F>& p, Saved<A, F>& s,
                            const ResidualIO<A>& io) {
    auto& arena = ctx.arena();
    s.h = arena.template tensor<A>(s.o.rows(), width);
    s.m = arena.template tensor<A>(s.o.rows(), d_model);
    s.gated = arena.template tensor<A>(s.o.rows(), d_ff);
    rms_norm_concat(ctx, io.x, io.t, p.input_norm, C.norm_eps, s.h, s.input_rstd);
    rms_norm(ctx, s.o, {}, p.pre_ff_norm, C.norm_eps, s.m, s.ff_rstd);
    gated_activation(ctx, Activation::gelu, gate(s.gate_up), up(s.gate_up), s.gated);
  }

  static AttentionShape shape() {
    const double scale = C.softmax_scale > 0 ? C.softmax_scale : std::pow(0.5 * static_cast<double>(head_dim), -0.5);
    return {C.n_heads, C.kv_heads(), head_dim, scale};
  }
  static RopeShape turn(Index heads) { return {heads, head_dim, C.theta()}; }

  template <class A>
  static Matrix<A> gate(Matrix<A> gate_up) {
    return gate_up.columns(0, d_ff);
  }
  template <class A>
  static Matrix<A> up(Matrix<A> gate_up) {
    return gate_up.columns(d_ff, d_ff);
  }
};

}  // namespace zamba
