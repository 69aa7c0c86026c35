// SPDX-License-Identifier: MIT
// Mamba2Block: the Mamba-2 layer, alone or as the mixer of Zamba2.
//
//   h               = rms(x + t)
//   [z, xBC, delta] = h Win^T                                    D, D + 2 G N and H wide
//   [u, B, C]       = silu( causal depthwise conv(xBC) + bias )  one convolution over all three
//   y               = ssd(u, delta, B, C)                        H heads of P = D / H channels, in G groups
//   out             = x + gated_rms_norm(y, z) Wout^T
//
//            +-> z -------------------------------- silu --.
//   x -> rms -> Win -> u, B, C -> conv -> silu -> ssd ----- * -> rms -> Wout -> + -> out
//    \         '--> delta ------------------------^                             |
//     \_________________________________________________________________________/
//
// Source: Mamba-2 (arXiv 2405.21060), section 7; the norm over groups: Zamba2 (arXiv 2411.15242).
// Implementations disagree on where dt is limited; here dt_min applies alike in prefill, decode and training.
#pragma once

#include <zamba/block.hpp>
#include <zamba/ops/causal_conv1d.hpp>
#include <zamba/ops/gated_rms_norm.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/ops/ssd.hpp>

namespace zamba {

/// Sizes of a Mamba2Block.
struct Mamba2Config {
  Index d_model;
  Index d_state = 128;
  Index d_conv = 4;
  Index expand = 2;
  Index n_heads = 0;      // 0: heads of 64 channels
  Index n_groups = 1;     // of heads that share B and C
  Index norm_groups = 0;  // of channels that the gated norm takes together; 0: n_groups
  double dt_min = 0;      // dt is at least this
  bool conv_bias = true;
  bool proj_bias = false;  // of in_proj and out_proj
  double norm_eps = 1e-5;
  double gated_norm_eps = 0;  // 0: norm_eps
  double init_std = 0;        // of normal initial weights; 0: by fan-in

  constexpr Index d_inner() const { return expand * d_model; }
  constexpr Index heads() const { return n_heads > 0 ? n_heads : d_inner() / 64; }
  constexpr Index head_dim() const { return d_inner() / heads(); }
  constexpr Index gated_norm_groups() const { return norm_groups > 0 ? norm_groups : n_groups; }
  constexpr double gated_eps() const { return gated_norm_eps > 0 ? gated_norm_eps : norm_eps; }
};

template <Mamba2Config C>
struct Mamba2Block {
  static_assert(detail::at_least<C.d_model, 1> && detail::at_least<C.d_state, 1> && detail::at_least<C.expand, 1> &&
                    detail::at_least<C.n_groups, 1>,
                "zamba::Mamba2Config: d_model, d_state, expand and n_groups must be positive");
  static_assert(detail::at_least<C.d_conv, 2>, "zamba::Mamba2Config: d_conv must be at least 2");
  static_assert(detail::divides<C.d_inner(), (C.n_heads > 0 ? C.n_heads : 64)>,
                "zamba::Mamba2Config: expand * d_model must be a multiple of n_heads, or of 64 where n_heads is 0");
  static_assert(detail::divides<C.heads(), C.n_groups>, "zamba::Mamba2Config: n_heads must be a multiple of n_groups");
  static_assert(detail::divides<C.d_inner(), C.gated_norm_groups()>,
                "zamba::Mamba2Config: expand * d_model must be a multiple of norm_groups");

  static constexpr Mamba2Config config = C;
  static constexpr bool by_operators = true;
  static constexpr Index d_model = C.d_model, D = C.d_inner(), H = C.heads(), N = C.d_state, G = C.n_groups,
                         K = C.d_conv;
  static constexpr Index conv_width = D + 2 * G * N, proj_width = D + conv_width + H;
  static constexpr double norm_eps = C.norm_eps, init_std = C.init_std;

  template <class W, class F>
  struct Parameters {
    Vector<F> norm;           // (d)
    Weight<W> in_proj;        // (2 D + 2 G N + H, d): z; u, B, C; delta
    Vector<F> in_proj_bias;   // (2 D + 2 G N + H)
    Matrix<F> conv_weight;    // (D + 2 G N, K)
    Vector<F> conv_bias;      // (D + 2 G N)
    Vector<F> dt_bias;        // (H)
    Vector<F> A_log;          // (H)
    Vector<F> skip;           // (H): D in the papers
    Vector<F> gated_norm;     // (D)
    Weight<W> out_proj;       // (d, D)
    Vector<F> out_proj_bias;  // (d)
  };

  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("norm.weight", p.norm, {{d_model}}, constant(1), Decay::no);
    visit("in_proj.weight", p.in_proj, {{proj_width, d_model}}, fan_in(d_model, init_std));
    if (C.proj_bias) visit("in_proj.bias", p.in_proj_bias, {{proj_width}}, constant(0), Decay::no);
    visit("conv1d.weight", p.conv_weight, {{conv_width, K}}, fan_in(K, init_std), Decay::no);
    if (C.conv_bias)
      visit("conv1d.bias", p.conv_bias, {{conv_width}}, init_std > 0 ? constant(0) : fan_in(K), Decay::no);
    visit("dt_bias", p.dt_bias, {{H}}, inverse_softplus_dt(), Decay::no);
    visit("A_log", p.A_log, {{H}}, log_arange(), Decay::no);
    visit("D", p.skip, {{H}}, constant(1), Decay::no);
    visit("gated_norm.weight", p.gated_norm, {{D}}, constant(1), Decay::no);
    visit("out_proj.weight", p.out_proj, {{d_model, D}}, residual_fan_in(D, init_std));
    if (C.proj_bias) visit("out_proj.bias", p.out_proj_bias, {{d_model}}, constant(0), Decay::no);
  }

  template <class S, class F>
  struct State {
    Tensor<F, 3> conv;  // (rows, K - 1, D + 2 G N): the last inputs of the convolution, oldest first
    Tensor<F, 3> scan;  // (rows, N, D)
  };

  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    visit("conv", s.conv, {{K - 1, conv_width}});
    visit("scan", s.scan, {{N, D}});
  }

  template <class A, class F>
  struct Saved {
    Vector<F> rstd;            // (tokens)
    Matrix<A> h;               // (tokens, d); not with Keep::costly
    Matrix<A> projected;       // (tokens, 2 D + 2 G N + H): z, xBC before the convolution, delta
    Matrix<A> uBC;             // (tokens, D + 2 G N) after it; not with Keep::costly
    Matrix<A> y;               // (tokens, D)
    Matrix<A> gated;           // (tokens, D); not with Keep::costly
    Matrix<F> gated_rstd;      // (tokens, groups of the norm)
    Tensor<F, 3> conv_before;  // (rows, K - 1, D + 2 G N): the convolution's state before this pass, where there is one
    Tensor<F, 3> checkpoints;  // of ssd
  };

  /// state: of the rows of `sequences`, continued and rewritten; empty views: every row starts from zero and leaves
  /// nothing.
  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>& state, Keep keep) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    Saved<A, F> s;
    s.rstd = arena.template tensor<F>(tokens);
    s.projected = arena.template tensor<A>(tokens, proj_width);
    s.y = arena.template tensor<A>(tokens, D);
    s.gated_rstd = arena.template tensor<F>(tokens, C.gated_norm_groups());
    if (keep != Keep::nothing) {
      s.checkpoints = arena.template tensor<F>(ssd_checkpoint_count(sequences), N, D);
      if (state.conv) {
        s.conv_before = arena.template tensor<F>(sequences.rows, K - 1, conv_width);
        ctx.copy(state.conv, s.conv_before);
      }
    }
    const auto kept = arena.mark();
    s.h = arena.template tensor<A>(tokens, d_model);
    s.uBC = arena.template tensor<A>(tokens, conv_width);
    s.gated = arena.template tensor<A>(tokens, D);

    rms_norm(ctx, io.x, io.t, p.norm, C.norm_eps, s.h, s.rstd);
    linear(ctx, s.h, p.in_proj, s.projected, {}, p.in_proj_bias);
    causal_conv1d(ctx, xBC_of(s.projected), p.conv_weight, p.conv_bias, sequences, state.conv, s.uBC);
    ssd(ctx, ssd_inputs(p, s), sequences, state.scan, s.y, s.checkpoints);
    gated_rms_norm(ctx, s.y, z_of(s.projected), p.gated_norm, C.gated_eps(), s.gated, s.gated_rstd);
    linear(ctx, s.gated, p.out_proj, io.out, io.x, p.out_proj_bias);
    if (keep == Keep::costly) {
      s.h = s.uBC = s.gated = {};
      arena.rewind(kept);
    }
    return s;
  }

  /// d: in, the gradient of out; out, that of x. d_t: receives the gradient of t, where t was given.
  /// d_state: in, the gradient of the state after this pass; out, that of the state before it. Empty views: none.
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       Saved<A, F> s, const ResidualIO<A>& io, Matrix<A> d, Matrix<A> d_t, const Sequences& sequences,
                       const State<S, F>&, const State<F, F>& d_state) {
    const Index tokens = sequences.tokens;
    auto& arena = ctx.arena();
    ArenaScope scope(arena);
    if (!s.h) compute_again(ctx, p, s, io, sequences);
    auto d_h = arena.template tensor<A>(tokens, d_model);
    auto d_projected = arena.template tensor<A>(tokens, proj_width);
    auto d_uBC = arena.template tensor<A>(tokens, conv_width);
    auto d_y = arena.template tensor<A>(tokens, D);
    auto d_gated = arena.template tensor<A>(tokens, D);

    linear_backward(ctx, d, s.gated, p.out_proj, d_gated, Accumulate::no, d_p.out_proj, d_p.out_proj_bias);
    gated_rms_norm_backward(ctx, d_gated, s.y, z_of(s.projected), p.gated_norm, s.gated_rstd, d_y, z_of(d_projected),
                            d_p.gated_norm);
    const SsdGradients<A, F> d_ssd{
        d_uBC.columns(0, D), delta_of(d_projected), states_of(d_uBC, 0), states_of(d_uBC, 1), d_p.A_log, d_p.skip,
        d_p.dt_bias};
    ssd_backward(ctx, d_y, ssd_inputs(p, s), sequences, s.checkpoints, d_ssd, d_state.scan);
    causal_conv1d_backward(ctx, d_uBC, xBC_of(s.projected), p.conv_weight, p.conv_bias, sequences, s.conv_before,
                           xBC_of(d_projected), d_p.conv_weight, d_p.conv_bias, d_state.conv);
    linear_backward(ctx, d_projected, s.h, p.in_proj, d_h, Accumulate::no, d_p.in_proj, d_p.in_proj_bias);
    rms_norm_backward(ctx, d_h, io.x, io.t, p.norm, s.rstd, d, d_t, d_p.norm);
  }

 private:
  /// What Keep::costly leaves out.
  template <class Device, class W, class F, class A>
  static void compute_again(Context<Device>& ctx, const Parameters<const W, const F>& p, Saved<A, F>& s,
                            const ResidualIO<A>& io, const Sequences& sequences) {
    auto& arena = ctx.arena();
    s.h = arena.template tensor<A>(sequences.tokens, d_model);
    s.uBC = arena.template tensor<A>(sequences.tokens, conv_width);
    s.gated = arena.template tensor<A>(sequences.tokens, D);
    ArenaScope scope(arena);
    Tensor<F, 3> conv_state;  // is rewritten
    if (s.conv_before) {
      conv_state = arena.template tensor<F>(sequences.rows, K - 1, conv_width);
      ctx.copy(s.conv_before, conv_state);
    }
    rms_norm(ctx, io.x, io.t, p.norm, C.norm_eps, s.h, s.rstd);
    causal_conv1d(ctx, xBC_of(s.projected), p.conv_weight, p.conv_bias, sequences, conv_state, s.uBC);
    gated_rms_norm(ctx, s.y, z_of(s.projected), p.gated_norm, C.gated_eps(), s.gated, s.gated_rstd);
  }

  /// The parts of what in_proj gives.
  template <class A>
  static Matrix<A> z_of(Matrix<A> projected) {
    return projected.columns(0, D);
  }
  template <class A>
  static Matrix<A> xBC_of(Matrix<A> projected) {
    return projected.columns(D, conv_width);
  }
  template <class A>
  static Matrix<A> delta_of(Matrix<A> projected) {
    return projected.columns(D + conv_width, H);
  }

  /// B (which = 0) or C (1) of all groups, (tokens, G, N).
  template <class A>
  static Tensor<A, 3> states_of(Matrix<A> uBC, Index which) {
    Tensor<A, 3> view(uBC.data + D + which * G * N, uBC.rows(), G, N);
    view.stride[0] = uBC.stride[0];
    return view;
  }

  template <class W, class F, class A>
  static SsdInputs<A, F> ssd_inputs(const Parameters<const W, const F>& p, const Saved<A, F>& s) {
    return {s.uBC.columns(0, D),
            delta_of(s.projected),
            states_of(s.uBC, 0),
            states_of(s.uBC, 1),
            p.A_log,
            p.skip,
            p.dt_bias,
            C.dt_min};
  }
};

}  // namespace zamba
