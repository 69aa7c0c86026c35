// SPDX-License-Identifier: MIT
// conformance passes a right block, and fails each wrong one at the check that is meant for it.
#include <zamba/testing/conformance.hpp>

#include <doctest/doctest.h>

using namespace zamba;

namespace {

enum class Fault {
  none,
  parameter_gradient,  // forgets a factor in d weight
  input_gradient,      // forgets the residual in d x
  state_gradient,      // returns that of the final state
  lost_state,          // a chunk begins from zero
  future,              // looks at the next token
  other_row,           // carries on over a row's end
  unwritten_state,     // reads the state of a row that has no past
  repeated_name,
  ignores_t,  // in backward only
};

/// s_t = w s_{t-1} + x_t + t_t from the carried state;  out_t = x_t + s_t.
template <Fault F>
struct Accumulator {
  static constexpr Index d_model = 3;

  template <class W, class P>
  struct Parameters {
    Vector<P> w, unused;
  };
  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("weight", p.w, {{d_model}}, constant(0.5));
    if (F == Fault::repeated_name) visit("weight", p.unused, {{d_model}}, constant(0));
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
    Matrix<A> before;  // (tokens, d): s_{t-1}
  };

  template <class Device, class W, class P, class A, class S>
  static Saved<A, P> forward(Context<Device>& ctx, const Parameters<const W, const P>& p, const Stream<A>& io,
                             const Sequences& sequences, const State<S, P>& state, Keep) {
    Saved<A, P> saved{ctx.arena().template tensor<A>(sequences.tokens, d_model)};
    const auto carries_on = [&](Index row) {
      if (F == Fault::lost_state) return false;
      return state.s && (F == Fault::unwritten_state || sequences.start(row) > 0);
    };
    for (Index i = 0; i < d_model; ++i) {
      A s = 0;
      for (Index row = 0; row < sequences.rows; ++row) {
        if (F != Fault::other_row || carries_on(row)) s = carries_on(row) ? state.s(row, 0, i) : 0;
        const Index end = sequences.offsets[row + 1];
        for (Index t = sequences.begin(row); t < end; ++t) {
          saved.before(t, i) = s;
          const Index from = F == Fault::future && t + 1 < end ? t + 1 : t;
          s = p.w[i] * s + io.x(from, i) + (io.t ? io.t(t, i) : 0);
          io.out(t, i) = io.x(t, i) + s;
        }
        if (state.s && sequences.length(row) > 0) state.s(row, 0, i) = s;
      }
    }
    return saved;
  }

  template <class Device, class W, class P, class A, class S>
  static void backward(Context<Device>&, const Parameters<const W, const P>& p, const Parameters<P, P>& d_p,
                       const Saved<A, P>& saved, const Stream<A>&, Matrix<A> d, Matrix<A> d_t,
                       const Sequences& sequences, const State<S, P>&, const State<P, P>& d_state) {
    for (Index i = 0; i < d_model; ++i)
      for (Index row = 0; row < sequences.rows; ++row) {
        if (sequences.length(row) == 0) continue;
        A d_s = d_state.s ? d_state.s(row, 0, i) : 0;
        for (Index t = sequences.offsets[row + 1] - 1; t >= sequences.begin(row); --t) {
          d_s += d(t, i);
          d_p.w[i] += d_s * saved.before(t, i) * (F == Fault::parameter_gradient ? A(0.9) : A(1));
          if (d_t) d_t(t, i) = F == Fault::ignores_t ? 0 : d_s;
          d(t, i) = F == Fault::input_gradient ? d_s : d(t, i) + d_s;
          d_s *= p.w[i];
        }
        if (d_state.s && F != Fault::state_gradient) d_state.s(row, 0, i) = sequences.start(row) > 0 ? d_s : 0;
      }
  }
};

template <Fault F>
std::string failed() {
  std::string names;
  const auto report = testing::conformance<Accumulator<F>>();
  for (const auto& line : report.lines())
    if (!line.passed()) names += line.name + "; ";
  return names;
}

bool mentions(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_SUITE("conformance") {
  TEST_CASE("a right block passes") {
    const auto report = testing::conformance<Accumulator<Fault::none>>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.text().starts_with("conformance: passed, "));
  }

  TEST_CASE("each wrong block fails where it is wrong") {
    CHECK(failed<Fault::parameter_gradient>() == "d weight; ");
    CHECK(failed<Fault::input_gradient>() == "d x; ");
    CHECK(failed<Fault::ignores_t>() == "d t; ");
    CHECK(failed<Fault::state_gradient>() == "d initial state; ");
    CHECK(failed<Fault::repeated_name>().starts_with("parameter names are unique; "));
    CHECK(mentions(failed<Fault::lost_state>(), "every split into two or three chunks: output"));
    CHECK(mentions(failed<Fault::lost_state>(), "token by token: state"));
    CHECK(mentions(failed<Fault::future>(), "causality, bit by bit"));
    CHECK(mentions(failed<Fault::other_row>(), "a ragged batch equals its rows alone"));
    CHECK(mentions(failed<Fault::unwritten_state>(), "every split"));
  }
}
