// SPDX-License-Identifier: MIT
// LanguageModel: tokens -> embedding -> stack -> norm -> head.
//
//   x0     = embedding[tokens]
//   x      = stack(x0)
//   logits = rms(x) head^T             the embedding's own weights, or others
#pragma once

#include <cmath>

#include <zamba/block.hpp>
#include <zamba/ops/cross_entropy.hpp>
#include <zamba/ops/embedding.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/ops/rms_norm.hpp>

namespace zamba {

/// The deviation of a fresh embedding, as Mamba's and Zamba's own programs have it. A token looks up one row, and all
/// that reads the stream reads it through a norm, so what counts is how large a row is beside what the layers add to
/// the stream: that depends on no width.
inline constexpr double embedding_std = 0.02;

namespace detail {

inline double draw_tied_embedding(Random& random, double inputs, Index, Index) {
  return std::fmin(embedding_std, 1 / std::sqrt(3 * inputs)) * random.normal();
}

/// Weights that are a head too are at most as large as fan_in makes a head. With 0.02 the logit of the token just read
/// grows as d_model does: a wide model would begin sure that every token comes twice.
constexpr Initializer embedding_values(Index d_model, bool tied, double std) {
  if (std > 0) return normal(std);
  return tied ? Initializer{draw_tied_embedding, static_cast<double>(d_model)} : normal(embedding_std);
}

}  // namespace detail

/// The weights of the head.
enum class Head {
  tied,  // the embedding's
  own,
};

template <Index Vocabulary, detail::CheckedBlock S, Head HeadWeights = Head::tied>
struct LanguageModel {
  static_assert(detail::at_least<Vocabulary, 1>, "zamba::LanguageModel: the vocabulary must hold at least one token");

  using Stack = S;
  static constexpr Index vocabulary = Vocabulary, d_model = Stack::d_model;
  static constexpr bool tied = HeadWeights == Head::tied;
  static constexpr bool by_operators = zamba::by_operators<Stack>;
  template <class Device>
  static constexpr bool runs_on = zamba::runs_on<Stack, Device>;
  static constexpr double norm_eps = [] {
    if constexpr (requires { Stack::norm_eps; })
      return Stack::norm_eps;
    else
      return 1e-5;
  }();

  /// Of normal initial weights, where the stack's blocks ask for them.
  static constexpr double init_std = zamba::init_std<Stack>;

  template <class W, class F>
  struct Parameters {
    Weight<W> embedding;  // (V, d)
    typename Stack::template Parameters<W, F> stack;
    Vector<F> final_norm;  // (d)
    Weight<W> head;        // (V, d), Head::own
  };

  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("embedding.weight", p.embedding, {{Vocabulary, d_model}}, detail::embedding_values(d_model, tied, init_std));
    Stack::visit_parameters(p.stack, visit.stream(residual_writes<Stack>));
    visit("final_norm.weight", p.final_norm, {{d_model}}, constant(1), Decay::no);
    if (!tied) visit("head.weight", p.head, {{Vocabulary, d_model}}, fan_in(d_model, init_std));
  }

  /// Of the embedding a token looks up one row; it meets the whole head.
  static constexpr Index active_parameters = Vocabulary * d_model + active_parameter_count<Stack> + d_model;

  template <class Cache, class F>
  using State = typename Stack::template State<Cache, F>;

  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    Stack::visit_state(s, visit);
  }

  template <class A, class F>
  struct Saved {
    Matrix<A> x0, x;  // (tokens, d) entering and leaving the stack
    typename Stack::template Saved<A, F> stack;
  };

  /// tokens (sequences.tokens), readable by the device, each in [0, Vocabulary).
  template <class A, class Device, class W, class F, class Cache>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Token* tokens,
                             const Sequences& sequences, const typename Stack::template State<Cache, F>& state,
                             Keep keep) {
    Saved<A, F> s;
    s.x0 = ctx.arena().template tensor<A>(sequences.tokens, d_model);
    s.x = ctx.arena().template tensor<A>(sequences.tokens, d_model);
    embedding(ctx, tokens, sequences.tokens, p.embedding, s.x0);
    s.stack = Stack::forward(ctx, p.stack, ResidualIO<A>{s.x0, {}, s.x}, sequences, state, keep);
    return s;
  }

  /// logits (n, V) of rows x (n, d) that left the stack.
  template <class Device, class W, class F, class A>
  static void logits(Context<Device>& ctx, const Parameters<const W, const F>& p, Matrix<const A> x, Matrix<A> out) {
    ArenaScope scope(ctx.arena());
    auto h = ctx.arena().template tensor<A>(x.rows(), d_model);
    auto rstd = ctx.arena().template tensor<F>(x.rows());
    rms_norm(ctx, x, {}, p.final_norm, norm_eps, h, rstd);
    linear(ctx, h, head_of(p), out);
  }

  /// *total += the next-token losses of rows x (n, d) that left the stack; targets < 0 carry none.
  template <class Device, class W, class F, class A>
  static void loss(Context<Device>& ctx, const Parameters<const W, const F>& p, Matrix<const A> x, const Token* targets,
                   LossSum* total) {
    ArenaScope scope(ctx.arena());
    auto h = ctx.arena().template tensor<A>(x.rows(), d_model);
    auto rstd = ctx.arena().template tensor<F>(x.rows());
    rms_norm(ctx, x, {}, p.final_norm, norm_eps, h, rstd);
    cross_entropy(ctx, h, head_of(p), targets, 0, total);
  }

  /// *total += the losses, z-loss included, and d_p += d(scale * sum of losses)/dp. d_state as in Block.
  template <class Device, class W, class F, class A, class Cache>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& s, const Token* tokens, const Token* targets, double scale, double z_loss,
                       const Sequences& sequences, const typename Stack::template State<Cache, F>& state,
                       const typename Stack::template State<F, F>& d_state, LossSum* total) {
    ArenaScope scope(ctx.arena());
    const Index n = sequences.tokens;
    auto h = ctx.arena().template tensor<A>(n, d_model);
    auto rstd = ctx.arena().template tensor<F>(n);
    auto d_h = ctx.arena().template tensor<A>(n, d_model);
    auto d = ctx.arena().template tensor<A>(n, d_model);
    rms_norm(ctx, s.x, {}, p.final_norm, norm_eps, h, rstd);
    cross_entropy_backward(ctx, h, head_of(p), targets, scale, d_h, head_of(d_p), z_loss, total);
    ctx.zero(d);
    rms_norm_backward(ctx, d_h, s.x, {}, p.final_norm, rstd, d, {}, d_p.final_norm);
    Stack::backward(ctx, p.stack, d_p.stack, s.stack, ResidualIO<A>{s.x0, {}, {}}, d, Matrix<A>{}, sequences, state,
                    d_state);
    embedding_backward(ctx, tokens, n, d, d_p.embedding);
  }

 private:
  template <class W, class F>
  static Weight<W> head_of(const Parameters<W, F>& p) {
    return tied ? p.embedding : p.head;
  }
};

}  // namespace zamba
