// SPDX-License-Identifier: MIT
// A block of your own, in one file: a leaky average of the past with a learned decay for each channel.
//
//   h = rms(x + t),  v = h Win^T,  s_t = a s_{t-1} + v_t with a = 1 / (1 + e^-decay),  out = x + s Wout^T
#include <cmath>
#include <iostream>

#include <zamba/testing/conformance.hpp>
#include <zamba/testing/initialisation.hpp>
#include <zamba/zamba.hpp>

using zamba::Index;

template <Index Width>
struct LeakyAverage {
  static constexpr Index d_model = Width;

  // Views of the parameters: W is the storage type of weights, F is float32 or better.
  template <class W, class F>
  struct Parameters {
    zamba::Vector<F> norm, decay;
    zamba::Weight<W> in, out;
  };
  // Listed once: counting, initialisation, files and the optimiser follow.
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("norm.weight", p.norm, {{Width}}, zamba::constant(1), zamba::Decay::no);
    visit("decay", p.decay, {{Width}}, zamba::uniform(3), zamba::Decay::no);
    visit("in.weight", p.in, {{Width, Width}}, zamba::fan_in(Width));
    visit("out.weight", p.out, {{Width, Width}}, zamba::residual_fan_in(Width));  // adds to x
  }

  // What a sequence leaves behind: one vector, whatever its length.
  template <class S, class F>
  struct State {
    zamba::Tensor<F, 3> s;  // (rows, 1, Width)
  };
  template <class States, class Visit>
  static constexpr void visit_state(States& state, Visit visit) {
    visit("s", state.s, {{1, Width}});
  }

  // What backward needs. Taken from the arena, which the caller rewinds.
  template <class A, class F>
  struct Saved {
    zamba::Vector<F> rstd;
    zamba::Matrix<A> h, v, s, before;  // before: the state that each row began from
  };

  template <class D, class W, class F, class A, class S>
  static Saved<A, F> forward(zamba::Context<D>& ctx, const Parameters<const W, const F>& p,
                             const zamba::ResidualIO<A>& io, const zamba::Sequences& rows, const State<S, F>& state,
                             zamba::Keep) {
    auto& arena = ctx.arena();
    const auto matrix = [&](Index n) { return arena.template tensor<A>(n, Width); };
    Saved<A, F> saved{arena.template tensor<F>(rows.tokens), matrix(rows.tokens), matrix(rows.tokens),
                      matrix(rows.tokens), matrix(rows.rows)};
    zamba::rms_norm(ctx, io.x, io.t, p.norm, 1e-5, saved.h, saved.rstd);
    zamba::linear(ctx, saved.h, p.in, saved.v);
    for (Index row = 0; row < rows.rows; ++row)
      for (Index c = 0; c < Width; ++c) {
        A s = saved.before(row, c) = state.s && rows.start(row) > 0 ? state.s(row, 0, c) : A(0);
        for (Index t = rows.begin(row); t < rows.begin(row + 1); ++t)
          s = saved.s(t, c) = leak(p.decay[c]) * s + saved.v(t, c);
        if (state.s && rows.length(row) > 0) state.s(row, 0, c) = s;
      }
    zamba::linear(ctx, saved.s, p.out, io.out, io.x);  // + x
    return saved;
  }

  template <class D, class W, class F, class A, class S>
  static void backward(zamba::Context<D>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& saved, const zamba::ResidualIO<A>& io, zamba::Matrix<A> d,
                       zamba::Matrix<A> d_t, const zamba::Sequences& rows, const State<S, F>&,
                       const State<F, F>& d_state) {
    zamba::ArenaScope scope(ctx.arena());
    auto d_s = ctx.arena().template tensor<A>(rows.tokens, Width);
    auto d_h = ctx.arena().template tensor<A>(rows.tokens, Width);
    zamba::linear_backward(ctx, d, saved.s, p.out, d_s, zamba::Accumulate::no, d_p.out);
    for (Index row = 0; row < rows.rows; ++row)
      for (Index c = 0; c < Width; ++c) {
        const A a = leak(p.decay[c]);
        A g = d_state.s ? d_state.s(row, 0, c) : A(0), d_a = 0;
        if (rows.length(row) == 0) continue;
        for (Index t = rows.begin(row + 1) - 1; t >= rows.begin(row); --t) {
          g = d_s(t, c) += t + 1 < rows.begin(row + 1) ? a * g : g;
          d_a += g * (t > rows.begin(row) ? saved.s(t - 1, c) : saved.before(row, c));
        }
        d_p.decay[c] += d_a * a * (1 - a);
        if (d_state.s) d_state.s(row, 0, c) = rows.start(row) > 0 ? a * g : A(0);
      }
    zamba::linear_backward(ctx, d_s, saved.h, p.in, d_h, zamba::Accumulate::no, d_p.in);
    zamba::rms_norm_backward(ctx, d_h, io.x, io.t, p.norm, saved.rstd, d, d_t, d_p.norm);
  }

 private:
  template <class F>
  static F leak(F decay) {
    return 1 / (1 + std::exp(-decay));
  }
};

int main() {
  // It stacks, nests and shares like the library's own blocks.
  using Shared = zamba::SharedAttention<zamba::SharedAttentionConfig{.d_model = 16, .n_heads = 2}>;
  using Net = zamba::LanguageModel<256, zamba::HybridStack<4, 2, LeakyAverage<16>, Shared>>;
  std::cout << zamba::parameter_count<Net> << " parameters\n";
  const auto conformance = zamba::testing::conformance<LeakyAverage<16>>();
  const auto initialisation = zamba::testing::initialisation<LeakyAverage<16>>();
  std::cout << conformance << initialisation;
  return conformance.passed() && initialisation.passed() ? 0 : 1;
}
