// SPDX-License-Identifier: MIT
// Below the members of Model: a shared block of your own, hidden states by layer, the gradient at the embedding, a loss
// of your own and an optimiser of your own. A small hybrid learns the logits of a teacher (distillation).
//
//   Model::parameters() are views, Net::forward and Net::Stack::backward take them, and Gradients collects the result.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <numeric>
#include <vector>

#include <zamba/ops/add.hpp>
#include <zamba/zamba.hpp>

using zamba::Index, zamba::Matrix, zamba::Vector, zamba::Weight, zamba::Accumulate, zamba::Activation;

// A shared block reads the stream x and the stack's own input x0 (as io.t), writes an out of its own, and has no
// residual: a linear of each use carries out into the mixer. Here an MLP whose weights all uses share,
//   h = rms(x + x0),  out = ( silu(h Wgate^T) * h Wup^T ) Wdown^T
template <Index Width, Index Hidden>
struct SharedMlp {
  static constexpr bool shared = true, by_operators = true;
  static constexpr Index d_model = Width;

  template <class W, class F>
  struct Parameters {
    Vector<F> norm;            // (d)
    Weight<W> gate, up, down;  // (Hidden, d) twice, (d, Hidden)
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("norm.weight", p.norm, {{Width}}, zamba::constant(1), zamba::Decay::no);
    visit("gate.weight", p.gate, {{Hidden, Width}}, zamba::normal(0.2));
    visit("up.weight", p.up, {{Hidden, Width}}, zamba::normal(0.2));
    visit("down.weight", p.down, {{Width, Hidden}}, zamba::normal(0.2));
  }
  template <class S, class F>
  struct State {};
  template <class States, class Visit>
  static constexpr void visit_state(States&, Visit) {}

  template <class A, class F>
  struct Saved {
    Vector<F> rstd;                  // (tokens)
    Matrix<A> h, gate, up, product;  // (tokens, d), then (tokens, Hidden) each
  };

  template <class D, class W, class F, class A, class S>
  static Saved<A, F> forward(zamba::Context<D>& ctx, const Parameters<const W, const F>& p,
                             const zamba::ResidualIO<A>& io, const zamba::Sequences& rows, const State<S, F>&,
                             zamba::Keep) {
    const auto matrix = [&](Index width) { return ctx.arena().template tensor<A>(rows.tokens, width); };
    Saved<A, F> s{ctx.arena().template tensor<F>(rows.tokens), matrix(Width), matrix(Hidden), matrix(Hidden),
                  matrix(Hidden)};
    zamba::rms_norm(ctx, io.x, io.t, p.norm, 1e-5, s.h, s.rstd);
    zamba::linear(ctx, s.h, p.gate, s.gate);
    zamba::linear(ctx, s.h, p.up, s.up);
    zamba::gated_activation(ctx, Activation::silu, s.gate, s.up, s.product);
    zamba::linear(ctx, s.product, p.down, io.out);
    return s;
  }

  // d_out comes as the gradient of out, a view of const; gradients are added to d_x and d_x0.
  template <class D, class W, class F, class A, class S>
  static void backward(zamba::Context<D>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& s, const zamba::ResidualIO<A>& io,
                       std::type_identity_t<Matrix<const A>> d_out, Matrix<A> d_x, Matrix<A> d_x0,
                       const zamba::Sequences& rows, const State<S, F>&, const State<F, F>&) {
    zamba::ArenaScope scope(ctx.arena());
    const auto matrix = [&](Index width) { return ctx.arena().template tensor<A>(rows.tokens, width); };
    const Matrix<A> d_product = matrix(Hidden), d_gate = matrix(Hidden), d_up = matrix(Hidden), d_h = matrix(Width),
                    d_t = matrix(Width);
    zamba::linear_backward(ctx, d_out, s.product, p.down, d_product, Accumulate::no, d_p.down);
    zamba::gated_activation_backward(ctx, Activation::silu, d_product, s.gate, s.up, d_gate, d_up);
    zamba::linear_backward(ctx, d_gate, s.h, p.gate, d_h, Accumulate::no, d_p.gate);
    zamba::linear_backward(ctx, d_up, s.h, p.up, d_h, Accumulate::yes, d_p.up);
    zamba::rms_norm_backward(ctx, d_h, io.x, io.t, p.norm, s.rstd, d_x, d_t, d_p.norm);
    zamba::add(ctx, d_t, d_x0);
  }
};

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 32, .n_heads = 2}>;
using Net = zamba::LanguageModel<64, zamba::HybridStack<4, 2, Mixer, SharedMlp<32, 48>>>;
using Model = zamba::Model<Net, double>;
using States = Net::State<double, double>;  // views of nothing: the document begins from zero and leaves no state

/// One document as blocks take it.
struct Document {
  std::vector<zamba::Token> tokens;
  std::vector<Index> offsets{0, static_cast<Index>(tokens.size())};
  Index size() const { return offsets.back(); }
  zamba::Sequences rows() const { return {offsets.data(), nullptr, 1, size(), size()}; }
};

/// The hidden states: what enters each layer, seen through the model's own norm and head.
void print_layers(zamba::Context<zamba::cpu>& ctx, const Model& model, const Document& document) {
  zamba::ArenaScope scope(ctx.arena());
  const auto s = Net::forward<double>(ctx, model.parameters(), document.tokens.data(), document.rows(), States{},
                                      zamba::Keep::everything);
  const auto logits = ctx.arena().tensor<double>(document.size(), Net::vocabulary);
  for (std::size_t layer = 0; layer < s.stack.x.size(); ++layer) {
    const Matrix<const double> x = s.stack.x[layer];  // (tokens, d)
    Net::logits(ctx, model.parameters(), x, logits);
    const Vector<double> last = logits[document.size() - 1];
    const double squares = std::inner_product(x.data, x.data + x.size(), x.data, 0.0);
    std::printf("entering layer %zu: rms %.4f, would say token %td\n", layer,
                std::sqrt(squares / static_cast<double>(x.size())),
                std::max_element(last.data, last.data + last.size()) - last.data);
  }
}

/// A loss of one's own, 1/2 mean (logits - wanted)^2; its gradients are added to `gradients`, and d_x0 (tokens, d)
/// receives that of the embedded tokens.
double distil(zamba::Context<zamba::cpu>& ctx, const Model& model, const Document& document,
              const std::vector<double>& wanted, Model::GradientsType& gradients, Matrix<double> d_x0) {
  zamba::ArenaScope scope(ctx.arena());
  const auto matrix = [&](Index width) { return ctx.arena().tensor<double>(document.size(), width); };
  const auto& p = model.parameters();
  const auto& d_p = gradients.views();
  const auto s =
      Net::forward<double>(ctx, p, document.tokens.data(), document.rows(), States{}, zamba::Keep::everything);
  const Matrix<double> h = matrix(Net::d_model), d_h = matrix(Net::d_model), logits = matrix(Net::vocabulary);
  const Vector<double> rstd = ctx.arena().tensor<double>(document.size());
  zamba::rms_norm(ctx, s.x, {}, p.final_norm, Net::norm_eps, h, rstd);
  zamba::linear(ctx, h, p.embedding, logits);  // the head is the embedding

  double loss = 0;
  const double mean = 1 / static_cast<double>(logits.size());
  for (Index i = 0; i < logits.size(); ++i) {
    const double difference = logits.data[i] - wanted[static_cast<std::size_t>(i)];
    loss += 0.5 * mean * difference * difference;
    logits.data[i] = mean * difference;  // from here on the gradient of the logits
  }

  zamba::linear_backward(ctx, logits, h, p.embedding, d_h, Accumulate::no, d_p.embedding);
  ctx.zero(d_x0);
  zamba::rms_norm_backward(ctx, d_h, s.x, {}, p.final_norm, rstd, d_x0, {}, d_p.final_norm);
  Net::Stack::backward(ctx, p.stack, d_p.stack, s.stack, zamba::ResidualIO<double>{s.x0, {}, {}}, d_x0,
                       Matrix<double>{}, document.rows(), States{}, States{});
  zamba::embedding_backward(ctx, document.tokens.data(), document.size(), d_x0, d_p.embedding);
  return loss;
}

/// An optimiser of one's own: a step of fixed length against the sign of each gradient's moving average (Lion,
/// arXiv 2302.06675, with one average).
class SignDescent {
 public:
  void step(Model& model, const Model::GradientsType& gradients, double rate) {
    const Vector<double> values = gradients.values();
    average_.resize(static_cast<std::size_t>(values.size()));
    for (const zamba::ParameterEntry& entry : model.entries()) {
      auto* weight = reinterpret_cast<double*>(model.data(entry));
      for (Index i = 0; i < entry.size; ++i) {
        double& average = average_[static_cast<std::size_t>(entry.offset + i)];
        average = 0.9 * average + 0.1 * values[entry.offset + i];
        weight[i] -= rate * static_cast<double>((average > 0) - (average < 0));
      }
    }
  }

 private:
  std::vector<double> average_;
};

int main() try {
  zamba::Context<zamba::cpu> ctx;
  Model model(zamba::Seed{1});
  const Document document{{7, 3, 61, 12, 5, 33, 8, 2, 19, 44, 7, 3}};
  print_layers(ctx, model, document);

  // The teacher: another seed's logits, four times as large.
  std::vector<double> wanted;
  const Model teacher(zamba::Seed{2});
  auto state = teacher.new_state({.batch = 1, .max_length = document.size()});
  const auto taught = teacher.extend(state, document.tokens, zamba::Positions::all);
  for (Index i = 0; i < taught.size(); ++i) wanted.push_back(4 * taught.data[i]);

  auto gradients = model.new_gradients();
  std::vector<double> memory(static_cast<std::size_t>(document.size() * Net::d_model));
  const Matrix<double> d_x0(memory.data(), document.size(), Net::d_model);
  SignDescent optimiser;
  double first = 0, last = 0;
  for (int step = 0; step < 100; ++step) {
    gradients.zero();
    last = distil(ctx, model, document, wanted, gradients, d_x0);
    if (step == 0) first = last;
    if (step % 20 == 0) std::printf("step %3d: loss %.5f\n", step, last);
    optimiser.step(model, gradients, 2e-3);
  }
  std::printf("gradient norm at the embedding of each token:");
  for (Index token = 0; token < document.size(); ++token) {
    const Vector<double> d = d_x0[token];
    std::printf(" %.1e", std::sqrt(std::inner_product(d.data, d.data + d.size(), d.data, 0.0)));
  }
  std::printf("\n");

  // The gradient is that of the loss: one weight of the shared block, by central differences.
  gradients.zero();
  distil(ctx, model, document, wanted, gradients, d_x0);
  const double given = gradients.views().stack.shared[0].down(3, 5);
  const zamba::ParameterEntry* entry = &model.entries().front();
  while (entry->name != "shared.0.down.weight") ++entry;
  auto& weight = reinterpret_cast<double*>(model.data(*entry))[3 * 48 + 5];
  const auto loss_at = [&](double value) {
    weight = value;
    return distil(ctx, model, document, wanted, gradients, d_x0);
  };
  const double here = weight, measured = (loss_at(here + 1e-5) - loss_at(here - 1e-5)) / 2e-5;
  std::printf("loss %.5f, at first %.5f; gradient of one weight %.6e, measured %.6e\n", last, first, given, measured);
  return last < 0.5 * first && std::abs(given - measured) < 1e-5 * std::abs(given) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
