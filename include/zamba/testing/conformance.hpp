// SPDX-License-Identifier: MIT
// conformance<B>(): checks a block of the library's or of your own against the rules of docs/add_a_block.md, on the
// CPU. A line that fails names the rule.
//
//   alone, in float64, eleven tokens
//     its listings; every cut into two and three, token by token; causality bit by bit; a ragged batch, one row of it
//     empty, against its rows alone; out in the memory of x; gradients against central differences; no state, no second
//     input, no gradient of the state; scratch memory against a dry run; no residual inside a shared block
//   and, where that passed,
//     long rows   of ConformanceOptions::lengths tokens: cuts beside every chunk, gradients along a direction
//     types       float32 and bf16 against float64 of the same weights, and cut against whole
//     a stack     of the block and the plainest others: kept against computed again, in place, gradients
//
// What a state, a cache and scratch memory hold before they are written is NaN throughout. A shared block is checked as
// one use of it, with the parameters of that use. What may read a view of nothing is tried in a child process first:
// the report tells how that ended, and goes on.
#pragma once

#include <set>
#include <type_traits>

#include <zamba/number.hpp>
#include <zamba/testing/block_passes.hpp>
#include <zamba/testing/block_rules.hpp>
#include <zamba/testing/child_process.hpp>
#include <zamba/testing/linear_blocks.hpp>

namespace zamba::testing {

struct ConformanceOptions {
  /// Of the long rows. The library's operators work in chunks of 64 tokens, and of 128 and 512 keys: the first crosses
  /// one more than once, the second all of them.
  std::vector<Index> lengths = {150, 600};
};

/// What is compiled: without other types and a stack it takes half as long.
enum class Passes { all, float64_alone };

namespace detail {

template <class B>
concept CheckedForItself = zamba::detail::Explained<B, zamba::detail::SaysShared<B>>::passed;

template <class Given, Passes P>
class Conformance {
 public:
  static constexpr bool shared = zamba::detail::SaysShared<Given>;
  using B = std::conditional_t<shared, SharedUse<Given>, Given>;
  using Run = BlockRun<B>;
  static constexpr Index d = B::d_model, tokens = 11, room = 16, before = 3;

  Conformance(const ConformanceOptions& options, Report& report) : options_(options), report_(report) {}

  void run() {
    listings();
    short_cuts();
    causality();
    ragged_batch();
    if constexpr (!shared) in_place();
    if constexpr (shared) residual();
    if constexpr (by_operators<Given>) dry_run();
    if (!gradients()) return;
    added();
    absent();
    if (!report_.passed()) return;  // what is wrong here is wrong there, too
    for (const Index length : options_.lengths) long_rows(length);
    if (!report_.passed()) return;
    if constexpr (P == Passes::all) {
      type<float>("float32");
      type<bf16>("bf16");
      stack();
    }
  }

 private:
  /// Whether f comes back; else a line tells how it ended.
  template <class F>
  bool comes_back(const BlockRule& rule, const std::string& name, F&& f) {
    const std::string end = ended_in_child(f);
    if (!end.empty()) report_.expect(rule, name, false, end);
    return end.empty();
  }

  void listings() {
    std::set<std::string> names, states;
    Index size = 0;
    for (const ParameterEntry& entry : one_.entries()) {
      names.insert(entry.name);
      size += entry.size;
    }
    report_.expect(block_rules::listing, "parameter names are unique", names.size() == one_.entries().size());
    report_.expect(block_rules::listing, "listed sizes add up to parameter_count", size == parameter_count<B>);
    typename B::template State<double, double> state;
    std::size_t tensors = 0;
    zamba::visit_state<B>(state, [&](const Name& name, auto&, Index, Index) {
      states.insert(name.str());
      ++tensors;
    });
    report_.expect(block_rules::listing, "names in the state are unique", states.size() == tensors);
  }

  void short_cuts() {
    Cuts<Run> cuts(one_, one_.random_point(tokens + 2));
    for (Index first = 1; first < tokens; ++first) {
      cuts.cut({first, tokens - first});
      for (Index second = 1; first + second < tokens; ++second) cuts.cut({first, second, tokens - first - second});
    }
    cuts.report(report_, block_rules::cuts, "every split into two or three chunks", rounding);
    cuts.cut_every(1);
    cuts.report(report_, block_rules::cuts, "token by token", rounding);
    const auto writes_numbers = [&](BlockPoint point) {
      const auto out = one_.forward(point, {{tokens}, {0}}).out;
      return !is_nan(dot(out, out));
    };
    auto point = one_.random_point(tokens);
    report_.expect(block_rules::fresh, "a fresh row does not read its state", writes_numbers(point));
    std::fill(point.state.begin(), point.state.end(), 0.0);
    report_.expect(block_rules::unused, "scratch memory may hold anything", writes_numbers(point));
  }

  void causality() {
    const auto point = one_.random_point(tokens);
    const auto whole = one_.forward(point, {{tokens}, {0}});
    bool causal = true;
    for (Index token = 0; token < tokens; ++token) {
      auto changed = point;
      for (Index i = token * d; i < (token + 1) * d; ++i) {
        changed.x[static_cast<std::size_t>(i)] += 1;
        changed.t[static_cast<std::size_t>(i)] -= 1;
      }
      const auto result = one_.forward(changed, {{tokens}, {0}});
      causal &= std::equal(result.out.begin(), result.out.begin() + token * d, whole.out.begin());
    }
    report_.expect(block_rules::causal, "causality, bit by bit", causal);
  }

  /// Two rows begin, two have a past, one of those gets no token.
  void ragged_batch() {
    Run four(4, room);
    const BlockRows rows{{4, 0, tokens - 6, 2}, {0, 5, 0, before}};
    auto point = four.random_point(tokens);
    Random random(Seed{23}, 0);
    for (std::size_t i = 0; i < point.state.size(); ++i)
      if (rows.starts[static_cast<std::size_t>(four.state_rows()[i])] > 0) point.state[i] = random.normal();
    const auto together = four.forward(point, rows);
    std::vector<double> out;
    double state_error = 0;
    Index first = 0;
    for (Index row = 0; row < 4; ++row) {
      const Index length = rows.lengths[static_cast<std::size_t>(row)];
      const auto state_after = row_of(together.state, four.state_rows(), row);
      auto alone = tokens_of(point, first, length, d);
      alone.state = row_of(point.state, four.state_rows(), row);
      first += length;
      if (length == 0) {
        report_.expect(block_rules::empty_row, "a row without tokens leaves its state", state_after == alone.state);
        continue;
      }
      const auto result = one_.forward(alone, {{length}, {rows.starts[static_cast<std::size_t>(row)]}});
      out.insert(out.end(), result.out.begin(), result.out.end());
      state_error = worse(state_error, written_error(state_after, result.state));
    }
    report_.add(block_rules::rows, "a ragged batch equals its rows alone", relative_error(together.out, out), rounding);
    report_.add(block_rules::rows, "a ragged batch equals its rows alone: state", state_error, rounding);
  }

  void in_place() {
    const auto point = one_.random_point(tokens);
    const auto apart = one_.forward(point, {{tokens}, {0}});
    const auto in_place = one_.forward(point, {{tokens}, {0}}, {.in_place = true});
    report_.add(block_rules::in_place, "out in the memory of x", relative_error(in_place.out, apart.out), rounding);
  }

  /// With weights of zero nothing of x or x0 is left: what comes through, and comes through unchanged in direction, is
  /// a residual.
  void residual() {
    auto point = one_.random_point(tokens);
    std::fill(point.parameters.begin(), point.parameters.end(), 0.0);
    const auto out = one_.forward(point, {{tokens}, {0}}).out;
    for (auto values : {&BlockPoint::x, &BlockPoint::t}) {
      auto moved = point;
      Random random(Seed{24}, 0);
      std::vector<double> by, change = one_.forward(point, {{tokens}, {0}}).out;
      for (double& value : moved.*values) value += by.emplace_back(random.normal());
      const auto after = one_.forward(moved, {{tokens}, {0}}).out;
      for (std::size_t i = 0; i < out.size(); ++i) change[i] = after[i] - out[i];
      const double share = dot(change, by) / dot(by, by);
      for (double& value : by) value *= share;
      const bool passes_through = std::abs(share) > rounding && relative_error(change, by) < 1e-6;
      report_.add(block_rules::no_residual, values == &BlockPoint::x ? "no residual of x" : "no residual of x0",
                  passes_through ? std::abs(share) : 0, rounding);
    }
  }

  void dry_run() {
    const char* name = "a dry run tells the scratch memory";
    for (const Index length : {Index{1}, tokens, Index{150}}) {
      if (!comes_back(block_rules::operators, name, [&] { dry_bytes<B>(1, length, length); })) return;
      Run run(1, length);
      const bool enough = run.fits(run.random_point(length), {{length}, {0}}, dry_bytes<B>(1, length, length));
      report_.expect(block_rules::operators, name + (": " + std::to_string(length)) + " tokens", enough);
    }
  }

  /// False where backward does not come back.
  bool gradients() {
    Run two(2, room);
    auto base = point_with_past(two, two.random_point(before + tokens), before, tokens);
    Objective<Run> objective(two, base, past_);
    if (!comes_back(block_rules::given, "backward without io.out", [&] { objective.gradients(base); })) return false;
    const auto gradient = objective.gradients(base);
    for (const ParameterEntry& entry : two.entries())
      report_.add(block_rules::gradients, "d " + entry.name,
                  element_error(objective, base, &BlockPoint::parameters, gradient, entry.offset, entry.size, 24),
                  difference);
    report_.add(block_rules::gradients, "d x",
                element_error(objective, base, &BlockPoint::x, gradient, 0, tokens * d, 60), difference);
    report_.add(block_rules::gradients, shared ? "d x0" : "d t",
                element_error(objective, base, &BlockPoint::t, gradient, 0, tokens * d, 60), difference);
    if (!base.state.empty())
      report_.add(
          block_rules::gradients, "d initial state",
          element_error(objective, base, &BlockPoint::state, gradient, 0, static_cast<Index>(base.state.size()), 400),
          difference);
    const auto again = objective.gradients(base);
    report_.expect(block_rules::again, "a rerun of backward is bit-equal",
                   again.parameters == gradient.parameters && again.x == gradient.x);
    double recomputed = 0;
    for (const Keep keep : {Keep::layer_inputs, Keep::costly})
      recomputed = worse(recomputed, relative_error(objective.gradients(base, {keep}).parameters, gradient.parameters));
    report_.add(block_rules::again, "recomputing gives the same gradients", recomputed, rounding);
    return true;
  }

  /// What backward adds to, what it assigns, and what it leaves.
  void added() {
    Run two(2, room);
    const auto base = point_with_past(two, two.random_point(before + tokens), before, tokens);
    Objective<Run> objective(two, base, past_);
    const auto gradient = objective.gradients(base);
    const auto onto = objective.gradients(
        base, {.keep = Keep::everything, .held = 0.5, .assigned_held = std::numeric_limits<double>::quiet_NaN()});
    // 0.5 takes the last bits of small gradients.
    report_.add(block_rules::added, "d_p is added to", relative_error(onto.parameters, gradient.parameters), 1e-9);
    if (shared) report_.add(block_rules::added, "d_x is added to", relative_error(onto.x, gradient.x), 1e-9);
    report_.add(block_rules::added, shared ? "d_x0 is added to" : "d_t is assigned", relative_error(onto.t, gradient.t),
                1e-9);

    const BlockRows empty{{0, tokens}, {before, 0}};
    Objective<Run> of_empty(two, base, empty);
    const auto left = of_empty.gradients(base);
    report_.expect(block_rules::empty_row, "a row without tokens leaves the gradient of its state",
                   row_of(left.state, two.state_rows(), 0) == row_of(of_empty.cotangent.state, two.state_rows(), 0));
  }

  /// Views of nothing equal zeros.
  void absent() {
    Run two(2, room);
    auto fresh = two.random_point(tokens);
    const BlockRows begin{past_.lengths, {0, 0}};
    const auto with_zero_gradient = [&](Objective<Run> objective) {
      std::fill(objective.cotangent.state.begin(), objective.cotangent.state.end(), 0.0);
      return objective;
    };
    if (!fresh.state.empty()) {
      compare_absent(block_rules::no_state, "no state", two, fresh, begin, {.state = false},
                     with_zero_gradient(Objective<Run>(two, fresh, begin)));
      const auto base = point_with_past(two, two.random_point(before + tokens), before, tokens);
      compare_absent(block_rules::given, "no gradient of the state", two, base, past_, {.state_gradient = false},
                     with_zero_gradient(Objective<Run>(two, base, past_)));
    }
    if (!shared) {
      std::fill(fresh.t.begin(), fresh.t.end(), 0.0);
      compare_absent(block_rules::second_input, "no second input", two, fresh, begin, {.second_input = false},
                     Objective<Run>(two, fresh, begin));
    }
  }
  void compare_absent(const BlockRule& rule, const std::string& name, Run& run, const BlockPoint& point,
                      const BlockRows& rows, BlockManner manner, Objective<Run> objective) {
    const auto wanted = run.forward(point, rows);
    const auto gradient = objective.gradients(point);
    if (!comes_back(rule, name + ": forward", [&] { run.forward(point, rows, manner); })) return;
    report_.add(rule, name + ": output", relative_error(run.forward(point, rows, manner).out, wanted.out), rounding);
    manner.keep = Keep::everything;
    if (!comes_back(rule, name + ": backward", [&] { objective.gradients(point, manner); })) return;
    const auto without = objective.gradients(point, manner);
    report_.add(rule, name + ": gradients",
                worse(relative_error(without.parameters, gradient.parameters), relative_error(without.x, gradient.x)),
                rounding);
  }

  /// Cuts before, at and behind the ends of chunks, and gradients of a row with a past as long as one.
  void long_rows(Index length) {
    const std::string name = std::to_string(length) + " tokens";
    Run one(1, length + 2);
    Cuts<Run> cuts(one, settled_point(one, length + 2));
    for (const Index first : {Index{1}, Index{63}, Index{64}, Index{65}, Index{128}, Index{130}, Index{511}, Index{512},
                              Index{513}, length - 1})
      if (first > 0 && first < length) cuts.cut({first, length - first});
    // Token by token, short_cuts() goes; as many passes as this row has tokens take a sanitizer seconds.
    for (const Index chunk : {Index{64}, Index{37}, unless_sanitized<Index>(1, 11)}) cuts.cut_every(chunk);
    cuts.report(report_, block_rules::cuts, name + ", cut", rounding);

    if (length < 4) return;  // two rows and a past
    Run two(2, length);
    const Index past = std::min<Index>(70, length / 2), last = std::min<Index>(7, length / 4), rest = length - past;
    const auto base = point_with_past(two, settled_point(one, length), past, rest);
    Objective<Run> objective(two, base, {{rest - last, last}, {past, 0}});
    directions(block_rules::gradients, name, two, objective, base);
  }

  template <class AnyRun>
  void directions(const BlockRule& rule, const std::string& name, const AnyRun& run, Objective<AnyRun>& objective,
                  const BlockPoint& base) {
    const auto gradient = objective.gradients(base);
    const auto line = [&](const std::string& of, std::vector<double> BlockPoint::*values, Index first, Index count) {
      report_.add(rule, name + ": d " + of, direction_error(objective, base, values, gradient, first, count),
                  difference);
    };
    for (const ParameterEntry& entry : run.entries()) {
      line(entry.name, &BlockPoint::parameters, entry.offset, entry.size);
      if (sanitized) break;  // they take the same passes
    }
    line("x", &BlockPoint::x, 0, static_cast<Index>(base.x.size()));
    line(shared ? "x0" : "t", &BlockPoint::t, 0, static_cast<Index>(base.t.size()));
    if (!base.state.empty()) line("initial state", &BlockPoint::state, 0, static_cast<Index>(base.state.size()));
  }

  /// Against float64 of the same stored values. 2e-5 are some three hundred roundings of float32; caches of bf16 round
  /// keys and values to 2^-9, and where a sequence is cut now and then the last bit of one.
  template <class T>
  void type(const std::string& name) {
    const Index length = options_.lengths.empty() ? tokens : options_.lengths.front();
    const BlockRows rows{{length}, {0}};
    Run exact(1, length + 2);
    BlockRun<B, T> run(1, length + 2);
    const bool coarse = std::is_same_v<T, bf16> && run.has_cache();
    const auto point = run.stored(settled_point(exact, length + 2)), whole = tokens_of(point, 0, length, d);
    Cuts<BlockRun<B, T>> cuts(run, point);
    report_.add(block_rules::types, name + ": output", relative_error(cuts.whole().out, exact.forward(whole, rows).out),
                coarse ? 0x1p-7 : 2e-5);
    for (const Index chunk : {Index{64}, Index{37}, Index{1}}) cuts.cut_every(chunk);
    cuts.report(report_, block_rules::types, name + ", cut", coarse ? 0x1p-9 : 2e-5);
    if constexpr (!std::is_same_v<T, compute_t<T>>) {  // float32 computes as bf16 does: only what is stored differs
      Objective<Run> objective(exact, whole, rows);
      const auto wanted = objective.gradients(whole), gradient = run.gradients(whole, rows, objective.cotangent);
      report_.add(block_rules::types, name + ": gradients",
                  worse(relative_error(gradient.parameters, wanted.parameters), relative_error(gradient.x, wanted.x)),
                  coarse ? 0x1p-6 : 1e-4);
    }
  }

  void stack() {
    using Stack = typename StackOf<Given, shared>::type;
    using StackRun = BlockRun<Stack>;
    StackRun one(1, room), two(2, room);
    const auto point = one.random_point(tokens);
    const auto kept = one.forward(point, {{tokens}, {0}}, {.keep = Keep::everything});
    for (const Keep keep : {Keep::nothing, Keep::layer_inputs})
      report_.add(shared ? block_rules::stacked : block_rules::in_place,
                  std::string("in a stack that keeps ") + (keep == Keep::nothing ? "nothing" : "what enters layers"),
                  relative_error(one.forward(point, {{tokens}, {0}}, {.keep = keep}).out, kept.out), rounding);
    Cuts<StackRun> cuts(one, one.random_point(tokens + 2));
    for (const Index chunk : {Index{4}, Index{1}}) cuts.cut_every(chunk);
    cuts.report(report_, block_rules::stacked, "in a stack, cut", rounding);

    const auto base = point_with_past(two, two.random_point(before + tokens), before, tokens);
    Objective<StackRun> objective(two, base, past_);
    const auto gradient = objective.gradients(base);
    const auto line = [&](const char* of, std::vector<double> BlockPoint::*values) {
      const Index count = static_cast<Index>((base.*values).size());
      if (count > 0)
        report_.add(block_rules::stacked, std::string("in a stack: d ") + of,
                    direction_error(objective, base, values, gradient, 0, count), difference);
    };
    line("parameters", &BlockPoint::parameters);
    line("x", &BlockPoint::x);
    line("t", &BlockPoint::t);
    line("initial state", &BlockPoint::state);
    for (const bool state : {true, false}) {
      const auto begin = state ? base : tokens_of(base, 0, tokens, d);
      const auto of_kept = objective.gradients(begin, {.keep = Keep::everything, .state = state});
      double d_parameters = 0, d_x = 0;
      for (const Keep keep : {Keep::layer_inputs, Keep::costly}) {
        const auto computed = objective.gradients(begin, {.keep = keep, .state = state});
        d_parameters = worse(d_parameters, relative_error(computed.parameters, of_kept.parameters));
        d_x = worse(d_x, relative_error(computed.x, of_kept.x));
      }
      const std::string name = std::string("in a stack, computed again, ") + (state ? "with" : "without") + " a state";
      report_.add(block_rules::again, name + ": d parameters", d_parameters, rounding);
      report_.add(block_rules::again, name + ": d x", d_x, rounding);
    }
  }

  ConformanceOptions options_;
  RuleReport report_;
  Run one_{1, room};
  BlockRows past_{{5, tokens - 5}, {before, 0}};
};

}  // namespace detail

/// Checks a block as listed at the top of this file. Takes a second or so for a block of d_model below 64. Throws where
/// a length is not positive.
template <detail::CheckedForItself Given, Passes P = Passes::all>
Report conformance(const ConformanceOptions& options = {}) {
  for (const Index length : options.lengths)
    require(length > 0, "ConformanceOptions: lengths must be positive, got ", length);
  Report report("conformance");
  detail::Conformance<Given, P>(options, report).run();
  return report;
}

}  // namespace zamba::testing
