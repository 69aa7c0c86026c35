// SPDX-License-Identifier: MIT
// MambaBlock: the Mamba layer, with the heads of Zamba.
//
//   h        = rms(x + t)
//   [u, z]   = h Win^T                                         D channels each
//   u        = silu( causal depthwise conv(u) + bias )
//   [r,B,C]_h = u_h Wx_h^T,   delta_h = r_h Wdt_h^T            for each of H heads, u_h its P = D / H channels
//   y        = selective_scan(u, delta, B, C) * silu(z)
//   out      = x + y Wout^T
//
//            +-> z ------------------------------ silu --.
//   x -> rms -> Win -> u -> conv -> silu -> scan -------- * -> Wout -> + -> out
//    \_______________________________________________________________/
//
// Source: Mamba (arXiv 2312.00752), section 3.4; heads: Zamba (arXiv 2405.16712) and its published checkpoint.
// In memory Win holds the rows of u, then those of z; checkpoints that interleave them are reordered by their loader.
#pragma once

#include <zamba/block.hpp>
#include <zamba/ops/causal_conv1d.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/ops/selective_scan.hpp>

namespace zamba {

/// Sizes of a MambaBlock.
struct MambaConfig {
  Index d_model;
  Index d_state = 16;
  Index d_conv = 4;
  Index expand = 2;
  Index dt_rank = 0;  // 0: ceil(d_model / 16)
  Index n_heads = 1;
  bool conv_bias = true;
  bool proj_bias = false;  // of in_proj and out_proj
  double norm_eps = 1e-5;
  double init_std = 0;  // of normal initial weights; 0: by fan-in

  constexpr Index d_inner() const { return expand * d_model; }
  constexpr Index head_dim() const { return d_inner() / n_heads; }
  constexpr Index rank() const { return dt_rank > 0 ? dt_rank : ceil_div(d_model, 16); }
};

template <MambaConfig C>
struct MambaBlock {
  static_assert(detail::at_least<C.d_model, 1> && detail::at_least<C.d_state, 1> && detail::at_least<C.expand, 1> &&
                    detail::at_least<C.n_heads, 1>,
                "zamba::MambaConfig: d_model, d_state, expand and n_heads must be positive");
  static_assert(detail::at_least<C.d_conv, 2>, "zamba::MambaConfig: d_conv must be at least 2");
  static_assert(detail::divides<C.d_inner(), C.n_heads>,
                "zamba::MambaConfig: expand * d_model must be a multiple of n_heads");

  static constexpr MambaConfig config = C;
  static constexpr bool by_operators = true;
  static constexpr Index d_model = C.d_model, D = C.d_inner(), H = C.n_heads, P = C.head_dim(), N = C.d_state,
                         R = C.rank(), K = C.d_conv;
  static constexpr double norm_eps = C.norm_eps, init_std = C.init_std;

  template <class W, class F>
  struct Parameters {
    Vector<F> norm;           // (d)
    Weight<W> in_proj;        // (2 D, d): u, then z
    Vector<F> in_proj_bias;   // (2 D)
    Matrix<F> conv_weight;    // (D, K)
    Vector<F> conv_bias;      // (D)
    Weight<W, 3> x_proj;      // (H, R + 2 N, P)
    Weight<W, 3> dt_proj;     // (H, P, R)
    Matrix<F> dt_bias;        // (H, P)
    Tensor<F, 3> A_log;       // (H, P, N)
    Matrix<F> skip;           // (H, P): D in the papers
    Weight<W> out_proj;       // (d, D)
    Vector<F> out_proj_bias;  // (d)
  };

  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("norm.weight", p.norm, {{d_model}}, constant(1), Decay::no);
    visit("in_proj.weight", p.in_proj, {{2 * D, d_model}}, fan_in(d_model, init_std));
    if (C.proj_bias) visit("in_proj.bias", p.in_proj_bias, {{2 * D}}, constant(0), Decay::no);
    visit("conv1d.weight", p.conv_weight, {{D, K}}, fan_in(K, init_std), Decay::no);
    if (C.conv_bias) visit("conv1d.bias", p.conv_bias, {{D}}, init_std > 0 ? constant(0) : fan_in(K), Decay::no);
    visit("x_proj.weight", p.x_proj, {{H, R + 2 * N, P}}, fan_in(P, init_std));
    visit("dt_proj.weight", p.dt_proj, {{H, P, R}}, fan_in(R));
    visit("dt_proj.bias", p.dt_bias, {{H, P}}, inverse_softplus_dt(), Decay::no);
    visit("A_log", p.A_log, {{H, P, N}}, log_arange(), Decay::no);
    visit("D", p.skip, {{H, P}}, constant(1), Decay::no);
    visit("out_proj.weight", p.out_proj, {{d_model, D}}, residual_fan_in(D, init_std));
    if (C.proj_bias) visit("out_proj.bias", p.out_proj_bias, {{d_model}}, constant(0), Decay::no);
  }

  template <class S, class F>
  struct State {
    Tensor<F, 3> conv;  // (rows, K - 1, D): the last inputs of the convolution, oldest first
    Tensor<F, 3> scan;  // (rows, N, D)
  };

  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    visit("conv", s.conv, {{K - 1, D}});
    visit("scan", s.scan, {{N, D}});
  }

  template <class A, class F>
  struct Saved {
    Vector<F> rstd;            // (tokens)
    Matrix<A> h;               // (tokens, d); not with Keep::costly
    Matrix<A> uz;              // (tokens, 2 D) before the convolution
    Matrix<A> u;               // (tokens, D) after it; not with Keep::costly
    Tensor<A, 3> rBC;          // (tokens, H, R + 2 N)
    Matrix<A> delta;           // (tokens, D)
    Matrix<A> y;               // (tokens, D)
    Tensor<F, 3> conv_before;  // (rows, K - 1, D): the convolution's state before this pass, where there is one
    Tensor<F, 3> checkpoints;  // of the scan
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
    s.uz = arena.template tensor<A>(tokens, 2 * D);
    s.rBC = arena.template tensor<A>(tokens, H, R + 2 * N);
    s.delta = arena.template tensor<A>(tokens, D);
    s.y = arena.template tensor<A>(tokens, D);
    if (keep != Keep::nothing) {
      s.checkpoints = arena.template tensor<F>(scan_checkpoint_count(sequences), N, D);
      if (state.conv) {
        s.conv_before = arena.template tensor<F>(sequences.rows, K - 1, D);
        ctx.copy(state.conv, s.conv_before);
      }
    }
    const auto kept = arena.mark();
    s.h = arena.template tensor<A>(tokens, d_model);
    s.u = arena.template tensor<A>(tokens, D);

    rms_norm(ctx, io.x, io.t, p.norm, C.norm_eps, s.h, s.rstd);
    linear(ctx, s.h, p.in_proj, s.uz, {}, p.in_proj_bias);
    causal_conv1d(ctx, s.uz.columns(0, D), p.conv_weight, p.conv_bias, sequences, state.conv, s.u);
    linear_heads(ctx, split_heads(s.u, H), p.x_proj, s.rBC);
    linear_heads(ctx, s.rBC.columns(0, R), p.dt_proj, split_heads(s.delta, H));
    selective_scan(ctx, scan_inputs(p, s), sequences, state.scan, s.y, s.checkpoints);
    linear(ctx, s.y, p.out_proj, io.out, io.x, p.out_proj_bias);
    if (keep == Keep::costly) {
      s.h = s.u = {};
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
    auto d_uz = arena.template tensor<A>(tokens, 2 * D);
    auto d_u = arena.template tensor<A>(tokens, D);
    auto d_rBC = arena.template tensor<A>(tokens, H, R + 2 * N);
    auto d_delta = arena.template tensor<A>(tokens, D);
    auto d_y = arena.template tensor<A>(tokens, D);

    linear_backward(ctx, d, s.y, p.out_proj, d_y, Accumulate::no, d_p.out_proj, d_p.out_proj_bias);
    const SelectiveScanGradients<A, F> d_scan{d_u,
                                              d_delta,
                                              d_uz.columns(D, D),
                                              d_rBC.columns(R, N),
                                              d_rBC.columns(R + N, N),
                                              d_p.A_log.as_matrix(),
                                              d_p.skip.flat(),
                                              d_p.dt_bias.flat()};
    selective_scan_backward(ctx, d_y, scan_inputs(p, s), sequences, s.checkpoints, d_scan, d_state.scan);
    linear_heads_backward(ctx, split_heads(d_delta, H), s.rBC.columns(0, R), p.dt_proj, d_rBC.columns(0, R),
                          Accumulate::no, d_p.dt_proj);
    linear_heads_backward(ctx, d_rBC, split_heads(s.u, H), p.x_proj, split_heads(d_u, H), Accumulate::yes, d_p.x_proj);
    causal_conv1d_backward(ctx, d_u, s.uz.columns(0, D), p.conv_weight, p.conv_bias, sequences, s.conv_before,
                           d_uz.columns(0, D), d_p.conv_weight, d_p.conv_bias, d_state.conv);
    linear_backward(ctx, d_uz, s.h, p.in_proj, d_h, Accumulate::no, d_p.in_proj, d_p.in_proj_bias);
    rms_norm_backward(ctx, d_h, io.x, io.t, p.norm, s.rstd, d, d_t, d_p.norm);
  }

 private:
  /// What Keep::costly leaves out.
  template <class Device, class W, class F, class A>
  static void compute_again(Context<Device>& ctx, const Parameters<const W, const F>& p, Saved<A, F>& s,
                            const ResidualIO<A>& io, const Sequences& sequences) {
    auto& arena = ctx.arena();
    s.h = arena.template tensor<A>(sequences.tokens, d_model);
    s.u = arena.template tensor<A>(sequences.tokens, D);
    ArenaScope scope(arena);
    Tensor<F, 3> conv_state;  // is rewritten
    if (s.conv_before) {
      conv_state = arena.template tensor<F>(sequences.rows, K - 1, D);
      ctx.copy(s.conv_before, conv_state);
    }
    rms_norm(ctx, io.x, io.t, p.norm, C.norm_eps, s.h, s.rstd);
    causal_conv1d(ctx, s.uz.columns(0, D), p.conv_weight, p.conv_bias, sequences, conv_state, s.u);
  }

  template <class W, class F, class A>
  static SelectiveScanInputs<A, F> scan_inputs(const Parameters<const W, const F>& p, const Saved<A, F>& s) {
    return {s.u,
            s.delta,
            s.uz.columns(D, D),
            s.rBC.columns(R, N),
            s.rBC.columns(R + N, N),
            p.A_log.as_matrix(),
            p.skip.flat(),
            p.dt_bias.flat()};
  }
};

}  // namespace zamba
