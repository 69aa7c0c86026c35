// SPDX-License-Identifier: MIT
// PatternStack: the order of the layers, which of them use a shared block, and the way back to the embedding.
//
//   x0 = x                                         the stack's input: the embedding
//   plain layer i     x = mixer_i( x )
//   hybrid layer i    t = shared( concat[x, x0] ) Wlinear_i^T
//                     x = mixer_i( x, t )          t enters the mixer's input, never the residual
//
// Source: Zamba (arXiv 2405.16712), figure 1; several shared blocks in turn, and parameters of a use, such as adapters:
// Zamba2 (arXiv 2411.15242).
// x0 collects a gradient from every use, a shared block's weights the sum over its uses.
#pragma once

#include <zamba/array.hpp>
#include <zamba/block.hpp>
#include <zamba/ops/add.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/shared_use.hpp>

namespace zamba {

/// One letter a layer, as a template argument: 'm' plain, 'h' hybrid.
template <std::size_t Size>
struct Pattern {
  char letters[Size] = {};

  constexpr Pattern() = default;
  constexpr Pattern(const char (&text)[Size]) {
    for (std::size_t i = 0; i < Size; ++i) letters[i] = text[i];
  }
  static constexpr Index layers() { return static_cast<Index>(Size) - 1; }
  constexpr bool hybrid(Index layer) const { return letters[layer] == 'h'; }
  /// Hybrid layers before `layer`: the ordinal of its use.
  constexpr Index uses_before(Index layer) const {
    Index uses = 0;
    for (Index i = 0; i < layer; ++i) uses += hybrid(i);
    return uses;
  }
  constexpr Index uses() const { return uses_before(layers()); }
  /// The first layer whose letter is neither 'm' nor 'h'; 0 where there is none.
  constexpr Index first_wrong() const {
    for (Index i = 0; i < layers(); ++i)
      if (letters[i] != 'm' && letters[i] != 'h') return i;
    return 0;
  }
};

namespace detail {

/// As `equal` in block.hpp: a failed static_assert prints the letter and its layer.
template <char Letter, Index Layer>
inline constexpr bool letter_of_layer = Letter == 'm' || Letter == 'h';

}  // namespace detail

/// The shared block of a stack that has none.
struct NoShared {
  static constexpr Index d_model = 0;
  template <class W, class F>
  struct Parameters {};
  template <class S, class F>
  struct State {};
  template <class A, class F>
  struct Saved {};
  template <class P, class Visit>
  static constexpr void visit_parameters(P&, Visit) {}
  template <class S, class Visit>
  static constexpr void visit_state(S&, Visit) {}
};

namespace detail {

/// As SharedBlock, and what is wrong is said.
template <class B>
concept CheckedShared = std::is_same_v<B, NoShared> || Explained<B, true>::passed;

}  // namespace detail

/// A stack of pattern P: `Mixer` in every layer; in hybrid layer number j, shared block j % Copies first.
template <Pattern P, detail::CheckedBlock Mixer, detail::CheckedShared Shared = NoShared, Index Copies = 1>
struct PatternStack {
  static constexpr Index d_model = Mixer::d_model, layers = P.layers(), uses = P.uses(), copies = uses > 0 ? Copies : 0;
  static constexpr auto pattern = P;
  using MixerType = Mixer;
  using SharedType = Shared;
  using Use = SharedUse<Shared>;
  static constexpr bool by_operators = zamba::by_operators<Mixer> && (uses == 0 || zamba::by_operators<Shared>);
  template <class Device>
  static constexpr bool runs_on = zamba::runs_on<Mixer, Device> && (uses == 0 || zamba::runs_on<Shared, Device>);
  /// Of the norm that follows the stack: that of its layers.
  static constexpr double norm_eps = [] {
    if constexpr (requires { Mixer::norm_eps; })
      return Mixer::norm_eps;
    else
      return 1e-5;
  }();
  /// Of what is the stack's own, and of what is around it: that of its layers.
  static constexpr double init_std = zamba::init_std<Mixer>;

  static_assert(detail::letter_of_layer<P.letters[P.first_wrong()], P.first_wrong()>,
                "zamba::PatternStack: the pattern must be a non-empty text of 'm' (plain) and 'h' (hybrid)");
  static_assert(uses == 0 || detail::equal<Mixer::d_model, Shared::d_model>,
                "zamba::PatternStack: the mixer and the shared block must have the same d_model");
  static_assert(
      uses > 0 || std::is_same_v<Shared, NoShared>,
      "zamba::PatternStack: no layer is hybrid, so the shared block would never be used; use UniformStack, or a "
      "period of at most the number of layers");
  static_assert(uses == 0 || (detail::at_least<Copies, 1> && detail::at_most<Copies, uses>),
                "zamba::PatternStack: Copies must be at least 1 and at most the number of hybrid layers");

  template <class W, class F>
  struct Parameters {
    detail::Array<typename Mixer::template Parameters<W, F>, layers> mixers;
    detail::Array<typename Shared::template Parameters<W, F>, copies> shared;
    detail::Array<typename Use::template UseParameters<W, F>, uses> use;
    detail::Array<Weight<W>, uses> linear;  // (d, d) of each hybrid layer
  };

  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    for (Index copy = 0; copy < copies; ++copy) Shared::visit_parameters(p.shared[copy], visit.scope("shared", copy));
    for (Index i = 0; i < layers; ++i) {
      const auto layer = visit.scope("layers", i);
      if constexpr (uses > 0) {
        if (P.hybrid(i)) {
          const Index use = P.uses_before(i);
          layer("linear.weight", p.linear[use], {{d_model, d_model}}, fan_in(d_model, init_std));
          Use::visit_use_parameters(p.use[use], layer);
        }
      }
      Mixer::visit_parameters(p.mixers[i], layer);
    }
  }

  /// Every use of a shared block meets its weights again.
  static constexpr Index active_parameters = layers * active_parameter_count<Mixer> + uses * d_model * d_model + [] {
    if constexpr (uses > 0)
      return uses * active_parameter_count<Use>;
    else
      return Index{0};
  }();

  template <class S, class F>
  struct State {
    detail::Array<typename Mixer::template State<S, F>, layers> mixers;
    detail::Array<typename Shared::template State<S, F>, uses> uses_of_shared;
  };

  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    for (Index i = 0; i < layers; ++i) {
      const auto layer = visit.scope("layers", i);
      Mixer::visit_state(s.mixers[i], layer);
      if constexpr (uses > 0)
        if (P.hybrid(i)) Shared::visit_state(s.uses_of_shared[P.uses_before(i)], layer);
    }
  }

  template <class A, class F>
  struct SavedLayer {
    typename Mixer::template Saved<A, F> mixer;
    typename Shared::template Saved<A, F> shared;
    Matrix<A> shared_out;  // (tokens, d)
    Matrix<A> t;           // (tokens, d)
  };

  template <class A, class F>
  struct Saved {
    Keep keep = Keep::nothing;
    detail::Array<Matrix<const A>, layers> x;       // (tokens, d) entering each layer
    detail::Array<SavedLayer<A, F>, layers> layer;  // Keep::costly and more
    detail::Array<Vector<F>, layers> state_before;  // Keep::layer_inputs, where there is a state
    detail::Array<Vector<F>, uses> shared_before;   // of the uses of shared blocks
  };

  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, ResidualIO<A> io,
                             const Sequences& sequences, const State<S, F>& state, Keep keep) {
    Saved<A, F> s;
    s.keep = keep;
    if (uses > 0 && io.out.data == io.x.data) {  // every hybrid layer reads io.x, after io.out was written
      const auto x0 = ctx.arena().template tensor<A>(sequences.tokens, d_model);
      ctx.copy(io.x, x0);
      io.x = x0;
    }
    Matrix<const A> x = io.x;
    for (Index i = 0; i < layers; ++i) {
      s.x[i] = x;
      const bool into_new = keep != Keep::nothing && i + 1 < layers;
      const Matrix<A> out = into_new ? ctx.arena().template tensor<A>(sequences.tokens, d_model) : io.out;
      if (keep >= Keep::costly) {
        s.layer[i] = forward_layer(ctx, p, i, x, io, out, sequences, state, keep);
      } else {
        if (keep == Keep::layer_inputs && has_state(state)) {
          s.state_before[i] = detail::save_rewritten<Mixer, F>(ctx, state.mixers[i]);
          if constexpr (uses > 0)
            if (const Index use = P.uses_before(i); P.hybrid(i))
              s.shared_before[use] = detail::save_rewritten<Shared, F>(ctx, state.uses_of_shared[use]);
        }
        ArenaScope scope(ctx.arena());
        forward_layer(ctx, p, i, x, io, out, sequences, state, Keep::nothing);
      }
      x = out;
    }
    return s;
  }

  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& s, const ResidualIO<A>& io, Matrix<A> d, Matrix<A> d_t,
                       const Sequences& sequences, const State<S, F>& state, const State<F, F>& d_state) {
    ArenaScope scope(ctx.arena());
    Matrix<A> d_x0;
    if constexpr (uses > 0) {
      d_x0 = ctx.arena().template tensor<A>(sequences.tokens, d_model);
      ctx.zero(d_x0);
    }
    for (Index i = layers - 1; i >= 0; --i) {
      ArenaScope layer_scope(ctx.arena());
      const auto layer = s.keep >= Keep::costly ? s.layer[i] : forward_again(ctx, p, i, s, io, sequences, state);
      Matrix<const A> t = i == 0 ? io.t : Matrix<const A>{};
      Matrix<A> d_layer_t = i == 0 ? d_t : Matrix<A>{};
      if (P.hybrid(i)) {
        t = layer.t;
        d_layer_t = ctx.arena().template tensor<A>(sequences.tokens, d_model);
      }
      Mixer::backward(ctx, p.mixers[i], d_p.mixers[i], layer.mixer, ResidualIO<A>{s.x[i], t, {}}, d, d_layer_t,
                      sequences, state.mixers[i], d_state.mixers[i]);
      if constexpr (uses > 0) {
        if (!P.hybrid(i)) continue;
        const Index use = P.uses_before(i);
        if (i == 0 && d_t) ctx.copy(d_layer_t, d_t);
        auto d_shared_out = ctx.arena().template tensor<A>(sequences.tokens, d_model);
        linear_backward(ctx, d_layer_t, layer.shared_out, p.linear[use], d_shared_out, Accumulate::no, d_p.linear[use]);
        Use::backward(ctx, of_use(p, use), of_use(d_p, use), layer.shared, ResidualIO<A>{s.x[i], io.x, {}},
                      d_shared_out, d, d_x0, sequences, state.uses_of_shared[use], d_state.uses_of_shared[use]);
      }
    }
    if (d_x0) add(ctx, d_x0, d);
  }

 private:
  /// What use number `use` meets.
  template <class W, class F>
  static typename Use::template Parameters<W, F> of_use(const Parameters<W, F>& p, Index use) {
    return {p.shared[use % copies], p.use[use]};
  }

  template <class Device, class W, class F, class A, class S>
  static SavedLayer<A, F> forward_layer(Context<Device>& ctx, const Parameters<const W, const F>& p, Index i,
                                        Matrix<const A> x, const ResidualIO<A>& io, Matrix<A> out,
                                        const Sequences& sequences, const State<S, F>& state, Keep keep) {
    SavedLayer<A, F> s;
    Matrix<const A> t = i == 0 ? io.t : Matrix<const A>{};
    if constexpr (uses > 0) {
      if (P.hybrid(i)) {
        const Index use = P.uses_before(i);
        s.shared_out = ctx.arena().template tensor<A>(sequences.tokens, d_model);
        s.t = ctx.arena().template tensor<A>(sequences.tokens, d_model);
        s.shared = Use::forward(ctx, of_use(p, use), ResidualIO<A>{x, io.x, s.shared_out}, sequences,
                                state.uses_of_shared[use], keep);
        linear(ctx, s.shared_out, p.linear[use], s.t, t);
        t = s.t;
      }
    }
    s.mixer = Mixer::forward(ctx, p.mixers[i], ResidualIO<A>{x, t, out}, sequences, state.mixers[i], keep);
    return s;
  }

  /// Layer i's forward pass once more, from what entered it and the state it began from.
  template <class Device, class W, class F, class A, class S>
  static SavedLayer<A, F> forward_again(Context<Device>& ctx, const Parameters<const W, const F>& p, Index i,
                                        const Saved<A, F>& s, const ResidualIO<A>& io, const Sequences& sequences,
                                        State<S, F> state) {
    if (s.state_before[i]) state.mixers[i] = detail::restore_rewritten<Mixer>(state.mixers[i], s.state_before[i]);
    if constexpr (uses > 0)
      if (const Index use = P.uses_before(i); P.hybrid(i) && s.shared_before[use])
        state.uses_of_shared[use] = detail::restore_rewritten<Shared>(state.uses_of_shared[use], s.shared_before[use]);
    const auto out = ctx.arena().template tensor<A>(sequences.tokens, d_model);
    return forward_layer(ctx, p, i, s.x[i], io, out, sequences, state, Keep::everything);
  }

  template <class S, class F>
  static bool has_state(State<S, F> state) {
    bool any = false;
    zamba::visit_state<PatternStack>(state, [&](const Name&, auto& tensor, Index, Index) { any |= bool(tensor); });
    return any;
  }
};

namespace detail {

template <Index Layers, class IsHybrid>
constexpr auto make_pattern(IsHybrid is_hybrid) {
  Pattern<static_cast<std::size_t>(Layers) + 1> pattern;
  for (Index i = 0; i < Layers; ++i) pattern.letters[i] = is_hybrid(i) ? 'h' : 'm';
  return pattern;
}

template <Index Layers, Index Period>
constexpr auto make_periodic_pattern() {
  static_assert(detail::at_least<Period, 1> && detail::at_most<Period, Layers>,
                "zamba::HybridStack: the period must be at least 1 and at most the number of layers, or no layer is "
                "hybrid; UniformStack is the stack without a shared block");
  return make_pattern<Layers>([](Index i) { return i % Period == Period - 1; });
}

template <Index Layers, Index... Hybrid>
constexpr auto make_listed_pattern() {
  static_assert((detail::at_least<Hybrid, 0> && ...) && (detail::at_most<Hybrid, Layers - 1> && ...),
                "zamba::listed_pattern: hybrid layers are counted from 0, below the number of layers");
  return make_pattern<Layers>([](Index i) { return ((i == Hybrid) || ...); });
}

}  // namespace detail

/// All layers plain.
template <Index Layers>
inline constexpr auto uniform_pattern = detail::make_pattern<Layers>([](Index) { return false; });

/// Layers i with i % Period == Period - 1 are hybrid.
template <Index Layers, Index Period>
inline constexpr auto periodic_pattern = detail::make_periodic_pattern<Layers, Period>();

/// The published rule of Zamba: layers 0 and 1 plain, 2 hybrid, then layer i + 3 hybrid iff i % Period == Offset.
template <Index Layers, Index Period, Index Offset>
inline constexpr auto zamba_pattern = detail::make_pattern<Layers>([](Index i) {
  return i == 2 || (i >= 3 && (i - 3) % Period == Offset);
});

/// The listed layers are hybrid.
template <Index Layers, Index... Hybrid>
inline constexpr auto listed_pattern = detail::make_listed_pattern<Layers, Hybrid...>();

/// Layers of `Mixer`, nothing shared.
template <Index Layers, detail::CheckedBlock Mixer>
using UniformStack = PatternStack<uniform_pattern<Layers>, Mixer>;

/// Layers of `Mixer`; the shared block at every Period-th.
template <Index Layers, Index Period, detail::CheckedBlock Mixer, detail::CheckedShared Shared, Index Copies = 1>
using HybridStack = PatternStack<periodic_pattern<Layers, Period>, Mixer, Shared, Copies>;

}  // namespace zamba
