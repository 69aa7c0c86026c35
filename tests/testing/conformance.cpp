// SPDX-License-Identifier: MIT
// conformance passes right blocks, and fails each wrong one at the check that is meant for it, naming the rule.
#include <zamba/testing/conformance.hpp>

#include <fstream>
#include <iterator>
#include <set>
#include <string>

#include <doctest/doctest.h>

#include <zamba/ops/selective_scan.hpp>
#include <zamba/ops/ssd.hpp>

using namespace zamba;
using testing::BlockRule;
namespace rules = zamba::testing::block_rules;

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
  ignores_t,           // in backward only
  forgets_at_64,       // the carry, every 64 tokens
  backward_forgets_at_64,
  reads_x_late,  // after out was written
  needs_state,   // reads a view of nothing
  needs_state_gradient,
  needs_t,
  needs_out,  // in backward
  assigns_parameter_gradient,
  adds_t_gradient,
  clears_empty_row,
  clears_gradient_of_empty_row,
  counts_on_zeros,  // in scratch memory
  reads_unused_slots,
  keeps_too_little,   // where a stack computes again
  stores_state_as_S,  // rounds it, whatever its type
  adds_in_bf16,
  does_not_end_alike,  // a random bit in a gradient
};

Fault fault = Fault::none;
int calls = 0;

bool is(Fault f) { return fault == f; }

/// s_t = w s_{t-1} + x_t + t_t from the carried state;  out_t = x_t + s_t.
template <bool RepeatedName = false, bool SaysByOperators = false>
struct Accumulator {
  static constexpr Index d_model = 3;
  static constexpr bool by_operators = SaysByOperators;

  template <class W, class P>
  struct Parameters {
    Vector<P> w, unused;
  };
  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("weight", p.w, {{d_model}}, constant(0.5));
    if (RepeatedName) visit("weight", p.unused, {{d_model}}, constant(0));
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
  static Saved<A, P> forward(Context<Device>& ctx, const Parameters<const W, const P>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, P>& state, Keep keep) {
    Saved<A, P> saved{ctx.arena().template tensor<A>(sequences.tokens, d_model)};
    const auto scratch = ctx.arena().template tensor<A>(d_model);
    const auto carries_on = [&](Index row) {
      if (is(Fault::lost_state)) return false;
      return (is(Fault::needs_state) || state.s) && (is(Fault::unwritten_state) || sequences.start(row) > 0);
    };
    for (Index i = 0; i < d_model; ++i) {
      A s = 0;
      for (Index row = 0; row < sequences.rows; ++row) {
        const bool leaves = state.s && (sequences.length(row) > 0 || is(Fault::clears_empty_row));
        if (!is(Fault::other_row) || carries_on(row)) s = carries_on(row) ? state.s(row, 0, i) : 0;
        if (is(Fault::clears_empty_row) && sequences.length(row) == 0) s = 0;
        if (is(Fault::counts_on_zeros)) s += scratch[i];
        const Index end = sequences.offsets[row + 1];
        for (Index t = sequences.begin(row); t < end; ++t) {
          if (is(Fault::forgets_at_64) && t > sequences.begin(row) && (t - sequences.begin(row)) % 64 == 0) s = 0;
          saved.before(t, i) = is(Fault::keeps_too_little) && keep == Keep::layer_inputs ? 0 : s;
          const Index from = is(Fault::future) && t + 1 < end ? t + 1 : t;
          s = p.w[i] * s + io.x(from, i) + (io.t || is(Fault::needs_t) ? io.t(t, i) : 0);
          if (is(Fault::adds_in_bf16) && std::is_same_v<A, float>)
            s = static_cast<A>(static_cast<float>(bf16(static_cast<float>(s))));
          io.out(t, i) = is(Fault::reads_x_late) ? s : io.x(t, i) + s;
        }
        if (is(Fault::stores_state_as_S)) s = static_cast<A>(static_cast<S>(static_cast<compute_t<S>>(s)));
        if (leaves || is(Fault::needs_state)) state.s(row, 0, i) = s;
      }
    }
    if (is(Fault::reads_x_late))
      for (Index t = 0; t < sequences.tokens; ++t)
        for (Index i = 0; i < d_model; ++i) io.out(t, i) += io.x(t, i);
    return saved;
  }

  template <class Device, class W, class P, class A, class S>
  static void backward(Context<Device>&, const Parameters<const W, const P>& p, const Parameters<P, P>& d_p,
                       const Saved<A, P>& saved, const ResidualIO<A>& io, Matrix<A> d, Matrix<A> d_t,
                       const Sequences& sequences, const State<S, P>&, const State<P, P>& d_state) {
    if (is(Fault::needs_out) && io.out(0, 0) == 0) return;
    ++calls;
    for (Index i = 0; i < d_model; ++i) {
      if (is(Fault::assigns_parameter_gradient)) d_p.w[i] = 0;
      for (Index row = 0; row < sequences.rows; ++row) {
        if (sequences.length(row) == 0) {
          if (is(Fault::clears_gradient_of_empty_row) && d_state.s) d_state.s(row, 0, i) = 0;
          continue;
        }
        A d_s = d_state.s || is(Fault::needs_state_gradient) ? d_state.s(row, 0, i) : 0;
        const Index begin = sequences.begin(row);
        for (Index t = sequences.offsets[row + 1] - 1; t >= begin; --t) {
          d_s += d(t, i);
          d_p.w[i] += d_s * saved.before(t, i) * (is(Fault::parameter_gradient) ? A(0.9) : A(1));
          if (is(Fault::does_not_end_alike) && t == 0) d_p.w[i] += A(1e-14) * calls;
          if (d_t) d_t(t, i) = (is(Fault::adds_t_gradient) ? d_t(t, i) : 0) + (is(Fault::ignores_t) ? 0 : d_s);
          d(t, i) = is(Fault::input_gradient) ? d_s : d(t, i) + d_s;
          d_s *= is(Fault::backward_forgets_at_64) && t > begin && (t - begin) % 64 == 0 ? 0 : p.w[i];
        }
        if (d_state.s && !is(Fault::state_gradient)) d_state.s(row, 0, i) = sequences.start(row) > 0 ? d_s : 0;
      }
    }
  }
};

/// The last Window inputs, in slots that are written one by one: out_t = x_t + w sum over the window.
template <Index Window>
struct Ring {
  static constexpr Index d_model = 2;

  template <class W, class P>
  struct Parameters {
    Vector<P> w;
  };
  template <class Params, class Visit>
  static constexpr void visit_parameters(Params& p, Visit visit) {
    visit("weight", p.w, {{d_model}}, constant(0.5));
  }
  template <class S, class P>
  struct State {
    Tensor<P, 3> slots;  // (rows, Window, d): position i in slot i % Window
  };
  template <class States, class Visit>
  static constexpr void visit_state(States& s, Visit visit) {
    visit("slots", s.slots, {{Window, d_model}});
  }
  template <class A, class P>
  struct Saved {
    Matrix<A> past;  // (rows Window, d): the slots before this pass
    Matrix<A> sums;  // (tokens, d)
  };

  template <class Device, class W, class P, class A, class S>
  static Saved<A, P> forward(Context<Device>& ctx, const Parameters<const W, const P>& p, const ResidualIO<A>& io,
                             const Sequences& rows, const State<S, P>& state, Keep) {
    Saved<A, P> saved{ctx.arena().template tensor<A>(rows.rows * Window, d_model),
                      ctx.arena().template tensor<A>(rows.tokens, d_model)};
    const auto inputs = ctx.arena().template tensor<A>(rows.tokens, d_model);
    for (Index t = 0; t < rows.tokens; ++t)
      for (Index c = 0; c < d_model; ++c) inputs(t, c) = io.x(t, c) + (io.t ? io.t(t, c) : 0);
    for (Index row = 0; row < rows.rows; ++row)
      for (Index c = 0; c < d_model; ++c) {
        const Index start = rows.start(row), begin = rows.begin(row), end = start + rows.length(row);
        for (Index k = 0; state.slots && k < Window; ++k) saved.past(row * Window + k, c) = state.slots(row, k, c);
        for (Index at = start; at < end; ++at) {
          A sum = 0;
          for (Index k = std::max<Index>(0, at - Window + 1); k <= at; ++k)
            sum += k < start ? saved.past(row * Window + k % Window, c) : inputs(begin + k - start, c);
          if (is(Fault::reads_unused_slots) && start > 0) sum += 0 * saved.past(row * Window + Window - 1, c);
          saved.sums(begin + at - start, c) = sum;
          io.out(begin + at - start, c) = io.x(begin + at - start, c) + p.w[c] * sum;
        }
        for (Index at = std::max(start, end - Window); state.slots && at < end; ++at)
          state.slots(row, at % Window, c) = inputs(begin + at - start, c);
      }
    return saved;
  }
  template <class Device, class W, class P, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const P>& p, const Parameters<P, P>& d_p,
                       const Saved<A, P>& saved, const ResidualIO<A>&, Matrix<A> d, Matrix<A> d_t,
                       const Sequences& rows, const State<S, P>&, const State<P, P>& d_state) {
    ArenaScope scope(ctx.arena());
    const auto d_in = ctx.arena().template tensor<A>(rows.tokens, d_model);
    ctx.zero(d_in);
    for (Index row = 0; row < rows.rows; ++row)
      for (Index c = 0; c < d_model; ++c) {
        const Index start = rows.start(row), begin = rows.begin(row), end = start + rows.length(row);
        for (Index at = std::max(start, end - Window); d_state.slots && at < end; ++at) {
          d_in(begin + at - start, c) += d_state.slots(row, at % Window, c);
          d_state.slots(row, at % Window, c) = 0;
        }
        for (Index at = start; at < end; ++at) {
          d_p.w[c] += d(begin + at - start, c) * saved.sums(begin + at - start, c);
          for (Index k = std::max<Index>(0, at - Window + 1); k <= at; ++k) {
            const A share = p.w[c] * d(begin + at - start, c);
            if (k >= start)
              d_in(begin + k - start, c) += share;
            else if (d_state.slots)
              d_state.slots(row, k % Window, c) += share;
          }
        }
      }
    if (d_t) ctx.copy(d_in, d_t);
    add(ctx, d_in, d);
  }
};

/// A layer of operators, which says so.
enum class Layer { right, takes_more };
template <Layer L>
struct Projection : testing::detail::LinearLayer<4> {
  using Base = testing::detail::LinearLayer<4>;
  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>& state, Keep keep) {
    if constexpr (L == Layer::takes_more && std::is_same_v<Device, cpu>) ctx.arena().template tensor<A>(100);
    return Base::forward(ctx, p, io, sequences, state, keep);
  }
};

/// out = (x + x0) W^T, or with a residual inside, or with gradients assigned.
enum class Reused { right, residual, residual_of_x0, assigns };
template <Reused R>
struct SharedSum : testing::detail::LinearShared<4> {
  using Base = testing::detail::LinearShared<4>;
  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>& state, Keep keep) {
    const auto saved = Base::forward(ctx, p, io, sequences, state, keep);
    if (R == Reused::residual) add(ctx, io.x, io.out);
    if (R == Reused::residual_of_x0) add(ctx, io.t, io.out);
    return saved;
  }
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& saved, const ResidualIO<A>& io, Matrix<const A> d_out, Matrix<A> d_x,
                       Matrix<A> d_x0, const Sequences& sequences, const State<S, F>& state,
                       const State<F, F>& d_state) {
    if (R == Reused::assigns) ctx.zero(d_x0);
    Base::backward(ctx, p, d_p, saved, io, d_out, d_x, d_x0, sequences, state, d_state);
    if (R == Reused::residual) add(ctx, d_out, d_x);
    if (R == Reused::residual_of_x0) add(ctx, d_out, d_x0);
  }
};

bool mentions(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// The names of failed lines, each of which must name its rule.
template <class B = Accumulator<>>
std::string failed(Fault f = Fault::none) {
  fault = f;
  const auto report = testing::conformance<B>();
  fault = Fault::none;
  std::string names;
  for (const auto& line : report.lines()) {
    if (line.passed()) continue;
    names += line.name + "; ";
    CHECK_MESSAGE(mentions(line.note, " of docs/add_a_block.md: "), line.name);
  }
  return names;
}

/// The report of a fault, whose first failed line breaks `rule`.
template <class B = Accumulator<>>
void check_breaks(const BlockRule& rule, const char* name, Fault f = Fault::none) {
  CAPTURE(name);
  fault = f;
  const auto report = testing::conformance<B>();
  fault = Fault::none;
  bool named = false;
  const std::string note = "rule " + std::to_string(rule.number) + " of docs/add_a_block.md: " + rule.text;
  for (const auto& line : report.lines())
    if (!line.passed() && mentions(line.name, name)) named |= mentions(line.note, note);
  CHECK_MESSAGE(named, report.text());
  CHECK_FALSE(report.passed());
}

}  // namespace

TEST_SUITE("conformance") {
  TEST_CASE("right blocks pass") {
    const auto report = testing::conformance<Accumulator<>>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.text().starts_with("conformance: passed, "));
    CHECK_FALSE(mentions(report.text(), "docs/add_a_block.md"));
    CHECK(failed<Ring<5>>() == "");   // fewer slots than tokens
    CHECK(failed<Ring<32>>() == "");  // slots that a short row does not write
    CHECK(failed<Projection<Layer::right>>() == "");
    CHECK(failed<SharedSum<Reused::right>>() == "");
  }

  TEST_CASE("each wrong block fails where it is wrong") {
    CHECK(failed(Fault::parameter_gradient) == "d weight; ");
    CHECK(failed(Fault::input_gradient) == "d x; ");
    CHECK(failed(Fault::ignores_t) == "d t; ");
    CHECK(failed(Fault::state_gradient) == "d initial state; ");
    CHECK(failed<Accumulator<true>>().starts_with("parameter names are unique; "));
    CHECK(mentions(failed(Fault::lost_state), "every split into two or three chunks: output"));
    CHECK(mentions(failed(Fault::lost_state), "token by token: state"));
    check_breaks(rules::causal, "causality, bit by bit", Fault::future);
    check_breaks(rules::rows, "a ragged batch equals its rows alone", Fault::other_row);
    check_breaks(rules::fresh, "a fresh row does not read its state", Fault::unwritten_state);
  }

  TEST_CASE("a carry forgotten where a chunk ends") {
    CHECK(mentions(failed(Fault::forgets_at_64), "150 tokens, cut: output"));
    check_breaks(rules::cuts, "600 tokens, cut: state", Fault::forgets_at_64);
    CHECK(failed(Fault::backward_forgets_at_64).starts_with("150 tokens: d weight; 150 tokens: d x; "));
    check_breaks(rules::gradients, "150 tokens: d x", Fault::backward_forgets_at_64);
    fault = Fault::forgets_at_64;  // rows of other lengths, or none
    CHECK(testing::conformance<Accumulator<>>({.lengths = {40, 64}}).passed());
    CHECK_FALSE(testing::conformance<Accumulator<>>({.lengths = {66}}).passed());
    CHECK(testing::conformance<Accumulator<>, testing::Passes::float64_alone>({.lengths = {}}).passed());
    fault = Fault::none;
    CHECK(testing::conformance<Accumulator<>>({.lengths = {1, 2, 4, 65}}).passed());
    CHECK_THROWS_AS(testing::conformance<Accumulator<>>({.lengths = {9, 0}}), Error);
  }

  TEST_CASE("views of nothing, and memory that holds anything") {
    check_breaks(rules::no_state, "no state: forward", Fault::needs_state);
    CHECK(failed(Fault::needs_state_gradient) == "no state: backward; no gradient of the state: backward; ");
    check_breaks(rules::given, "no gradient of the state: backward", Fault::needs_state_gradient);
    check_breaks(rules::second_input, "no second input: forward", Fault::needs_t);
    CHECK(failed(Fault::needs_out) == "backward without io.out; ");
    check_breaks(rules::given, "backward without io.out", Fault::needs_out);
    check_breaks(rules::in_place, "out in the memory of x", Fault::reads_x_late);
    check_breaks(rules::unused, "scratch memory may hold anything", Fault::counts_on_zeros);
    check_breaks<Ring<32>>(rules::unused, "every split into two or three chunks: output", Fault::reads_unused_slots);
    CHECK(failed<Ring<32>>(Fault::reads_unused_slots).find("a fresh row") == std::string::npos);
    fault = Fault::needs_t;
    CHECK(mentions(testing::conformance<Accumulator<>>().text(),
                   "ended by "));  // a signal, or what a sanitizer makes of it
    fault = Fault::none;
  }

  TEST_CASE("rows without tokens, gradients that are added and assigned") {
    CHECK(failed(Fault::clears_empty_row) == "a row without tokens leaves its state; ");
    check_breaks(rules::empty_row, "a row without tokens leaves the gradient", Fault::clears_gradient_of_empty_row);
    CHECK(failed(Fault::assigns_parameter_gradient) == "d_p is added to; ");
    CHECK(failed(Fault::adds_t_gradient) == "d_t is assigned; ");
    CHECK(failed<SharedSum<Reused::assigns>>() == "d_x0 is added to; ");
    check_breaks<SharedSum<Reused::assigns>>(rules::added, "d_x0 is added to");
  }

  TEST_CASE("computing again, and storage types") {
    check_breaks(rules::again, "recomputing gives the same gradients", Fault::keeps_too_little);
    check_breaks(rules::again, "a rerun of backward is bit-equal", Fault::does_not_end_alike);
    CHECK(failed(Fault::stores_state_as_S).starts_with("bf16, cut: output; "));
    CHECK(mentions(failed(Fault::adds_in_bf16), "float32: output"));
    check_breaks(rules::types, "bf16: output", Fault::adds_in_bf16);
  }

  TEST_CASE("a false by_operators, and a residual inside a shared block") {
    check_breaks<Accumulator<false, true>>(rules::operators, "a dry run tells the scratch memory");
    check_breaks<Projection<Layer::takes_more>>(rules::operators, "a dry run tells the scratch memory: 150 tokens");
    CHECK(failed<SharedSum<Reused::residual>>() == "no residual of x; ");
    CHECK(failed<SharedSum<Reused::residual_of_x0>>() == "no residual of x0; ");
    check_breaks<SharedSum<Reused::residual>>(rules::no_residual, "no residual of x");
  }

  TEST_CASE("the rules stand in the documentation, and long rows cross every chunk of the library") {
    std::ifstream file(ZAMBA_TEST_DATA "/../../docs/add_a_block.md");
    const std::string page{std::istreambuf_iterator<char>(file), {}};
    for (const BlockRule* rule : rules::all)
      CHECK_MESSAGE(mentions(page, "| " + std::to_string(rule->number) + " | " + rule->text + " |"), rule->text);
    const testing::ConformanceOptions options;
    CHECK(options.lengths[0] > 2 * scan_chunk);
    CHECK(options.lengths[0] > 2 * ssd_chunk);
    CHECK(options.lengths[1] > DeviceTraits<cpu>::prefill_chunk);
  }
}
