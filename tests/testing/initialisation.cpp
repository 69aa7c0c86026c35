// SPDX-License-Identifier: MIT
// initialisation passes blocks that begin well, at every width, and fails each dead one at the part that is dead.
#include <zamba/testing/initialisation.hpp>

#include <set>
#include <string>

#include <doctest/doctest.h>

#include <tests/support/nets.hpp>

using namespace zamba_test;
using zamba::testing::initialisation;

namespace {

using Lines = std::set<std::string>;

Lines failed_lines(const testing::Report& report) {
  Lines names;
  for (const auto& line : report.lines())
    if (!line.passed()) names.insert(line.name);
  return names;
}

template <Index D>
using MambaOf = MambaBlock<MambaConfig{.d_model = D, .d_state = 4, .n_heads = 2, .proj_bias = true}>;
template <Index D>
using Mamba2Of = Mamba2Block<Mamba2Config{.d_model = D, .d_state = 16, .n_heads = 4, .n_groups = 2}>;
template <Index D>
using SharedOf = SharedAttention<SharedAttentionConfig{
    .d_model = D, .n_heads = 4, .n_kv_heads = 2, .rope = true, .mlp_adapter_rank = 8, .qkv_adapter_rank = 4}>;
template <Index D>
using TransformerOf = TransformerBlock<TransformerConfig{.d_model = D, .n_heads = 4, .n_kv_heads = 2}>;

/// The same blocks as one published width has them.
template <Index D>
using OldMamba = MambaBlock<MambaConfig{.d_model = D, .init_std = 0.02}>;
template <Index D>
using OldMamba2 = Mamba2Block<Mamba2Config{.d_model = D, .d_state = 16, .n_heads = 4, .init_std = 0.02}>;

enum class Fault {
  none,
  dead_memory,    // two factors that begin at 1e-3 and 1e-4: neither is felt
  zero_memory,    // one factor begins at zero: the other is dead
  unread,         // the output does not depend on a parameter
  lost_gradient,  // backward forgets a parameter
  faint,          // all that is added is small
};

/// A block of two parts, each listed in a scope of its own:
///   s_t = s_{t-1} / 2 + in x_t,   out = x + direct x + (memory's) out s
template <Fault F>
struct TwoParts {
  static constexpr Index d_model = 6;

  template <class P>
  struct Memory {
    Vector<P> in, out;
    template <class Visit>
    static constexpr void visit_parameters(Memory& p, Visit visit) {
      const double in_size = F == Fault::dead_memory ? 1e-3 : 1;
      const double out_size = F == Fault::dead_memory   ? 1e-4
                              : F == Fault::zero_memory ? 0
                              : F == Fault::faint       ? 1e-3
                                                        : 1;
      visit("in", p.in, {{d_model}}, uniform(in_size));
      visit("out", p.out, {{d_model}}, uniform(out_size));
    }
  };
  template <class W, class P>
  struct Parameters {
    Vector<P> direct;
    Memory<P> memory;
  };
  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit.scope("direct")("gain", p.direct, {{d_model}}, uniform(F == Fault::faint ? 1e-3 : 1));
    p.memory.visit_parameters(p.memory, visit.scope("memory"));
  }

  template <class S, class P>
  struct State {
    Tensor<P, 3> s;  // (rows, 1, d)
  };
  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    visit("s", s.s, {{1, d_model}});
  }
  template <class A, class P>
  struct Saved {
    Matrix<A> s;  // (tokens, d)
  };

  template <class Device, class W, class P, class A, class S>
  static Saved<A, P> forward(Context<Device>& ctx, const Parameters<const W, const P>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, P>& state, Keep) {
    Saved<A, P> saved{ctx.arena().template tensor<A>(sequences.tokens, d_model)};
    for (Index row = 0; row < sequences.rows; ++row)
      for (Index i = 0; i < d_model; ++i) {
        A s = state.s && sequences.start(row) > 0 ? state.s(row, 0, i) : A(0);
        for (Index t = sequences.begin(row); t < sequences.begin(row + 1); ++t) {
          s = saved.s(t, i) = s / 2 + p.memory.in[i] * io.x(t, i);
          const P direct = F == Fault::unread ? P(0.5) : p.direct[i];
          io.out(t, i) = (1 + direct) * io.x(t, i) + p.memory.out[i] * s;
        }
        if (state.s && sequences.length(row) > 0) state.s(row, 0, i) = s;
      }
    return saved;
  }
  /// Without the gradient of the state, which the check does not ask for.
  template <class Device, class W, class P, class A, class S>
  static void backward(Context<Device>&, const Parameters<const W, const P>& p, const Parameters<P, P>& d_p,
                       const Saved<A, P>& saved, const ResidualIO<A>& io, Matrix<A> d, Matrix<A>,
                       const Sequences& sequences, const State<S, P>&, const State<P, P>&) {
    for (Index row = 0; row < sequences.rows; ++row)
      for (Index i = 0; i < d_model; ++i) {
        A g = 0;
        for (Index t = sequences.begin(row + 1) - 1; t >= sequences.begin(row); --t) {
          g = g / 2 + p.memory.out[i] * d(t, i);
          if (F != Fault::lost_gradient) d_p.memory.in[i] += g * io.x(t, i);
          d_p.memory.out[i] += d(t, i) * saved.s(t, i);
          if (F != Fault::unread) d_p.direct[i] += d(t, i) * io.x(t, i);
          d(t, i) += p.direct[i] * d(t, i) + p.memory.in[i] * g;
        }
      }
  }
};

}  // namespace

TEST_SUITE("initialisation") {
  TEST_CASE_TEMPLATE("the library's blocks pass, from narrow to wide", B, MambaOf<8>, MambaOf<32>, MambaOf<64>,
                     MambaOf<320>, Mamba2Of<8>, Mamba2Of<32>, Mamba2Of<64>, Mamba2Of<320>, SharedOf<8>, SharedOf<32>,
                     SharedOf<64>, TransformerOf<8>, TransformerOf<32>, TransformerOf<64>) {
    const auto report = initialisation<B>();
    CHECK_MESSAGE(report.passed(), report.text());
  }

  TEST_CASE_TEMPLATE("stacks pass, nested ones too", B, HybridStack<4, 2, MambaOf<32>, SharedOf<32>>,
                     PatternStack<"hmh", Mamba2Of<32>, SharedOf<32>, 2>, Nested::Stack,
                     UniformStack<3, TransformerOf<32>>) {
    const auto report = initialisation<B>();
    CHECK_MESSAGE(report.passed(), report.text());
  }

  TEST_CASE("every parameter and every tensor of the state has its lines") {
    const auto report = initialisation<SharedAttention<SharedAttentionConfig{.d_model = 8, .mlp_adapter_rank = 2}>>();
    Lines lines;
    for (const auto& line : report.lines()) lines.insert(line.name);
    Lines wanted{"what is added to the input", "state keys: output", "state values: output"};
    for (const char* name :
         {"input_norm.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "pre_ff_norm.weight",
          "gate_up.weight", "down_proj.weight", "gate_up_adapter.a.weight", "gate_up_adapter.b.weight"})
      for (const char* what : {": output", ": gradient"}) wanted.insert(std::string(name) + what);
    CHECK(lines == wanted);
  }

  TEST_CASE_TEMPLATE("a narrow Mamba whose weights have the deviation of a wide one is dead behind its state", B,
                     OldMamba<32>, OldMamba<64>) {
    CHECK(failed_lines(initialisation<B>()) ==
          Lines{"what is added to the input", "x_proj.weight: output", "x_proj.weight: gradient",
                "dt_proj.weight: output", "dt_proj.weight: gradient", "dt_proj.bias: output", "dt_proj.bias: gradient",
                "A_log: output", "A_log: gradient", "state scan: output"});
  }

  TEST_CASE_TEMPLATE("and so is a narrow Mamba-2", B, OldMamba2<32>, OldMamba2<64>) {
    CHECK(failed_lines(initialisation<B>()) ==
          Lines{"dt_bias: output", "dt_bias: gradient", "A_log: output", "A_log: gradient", "state scan: output"});
  }

  TEST_CASE("a stack of dead blocks is dead layer by layer") {
    const auto failed = failed_lines(initialisation<UniformStack<2, OldMamba<32>>>());
    for (const char* name : {"layers.0.x_proj.weight: output", "layers.1.x_proj.weight: gradient",
                             "state layers.0.scan: output", "state layers.1.scan: output"})
      CHECK(failed.contains(name));
  }

  TEST_CASE("a user's block of two parts: what is dead is named") {
    CHECK(failed_lines(initialisation<TwoParts<Fault::none>>()) == Lines{});
    CHECK(failed_lines(initialisation<TwoParts<Fault::dead_memory>>()) ==
          Lines{"memory.in: output", "memory.out: output", "state s: output"});
    CHECK(failed_lines(initialisation<TwoParts<Fault::zero_memory>>()) ==
          Lines{"memory.in: output", "memory.in: gradient", "state s: output"});
    CHECK(failed_lines(initialisation<TwoParts<Fault::unread>>()) ==
          Lines{"direct.gain: output", "direct.gain: gradient"});
    CHECK(failed_lines(initialisation<TwoParts<Fault::lost_gradient>>()) == Lines{"memory.in: gradient"});
    CHECK(failed_lines(initialisation<TwoParts<Fault::faint>>()) == Lines{"what is added to the input"});
  }
}
