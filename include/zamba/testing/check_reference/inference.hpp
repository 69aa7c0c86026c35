// SPDX-License-Identifier: MIT
// Logits, hidden states, caches and the greedy continuation of a reference case.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include <zamba/context.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/testing/check_reference/compare.hpp>
#include <zamba/testing/check_reference/run.hpp>

namespace zamba::testing::detail {

template <class Net, class T, class Device>
class InferenceCheck {
 public:
  using Run = ReferenceRun<Net, T, Device>;

  explicit InferenceCheck(Run& run) : run_(run) {}

  void run() {
    forward();
    extend({run_.length}, "extend");
    extend({1, 3, run_.length - 1, run_.length}, "extend in chunks");
    greedy();
  }

 private:
  using F = compute_t<T>;
  using A = activation_t<T, Device>;
  using StateType = typename Model<Net, T, Device>::StateType;

  static constexpr bool hidden_states_leave() {
    if constexpr (requires { CheckpointFormat<Net>::hidden_states_leave_layers; })
      return CheckpointFormat<Net>::hidden_states_leave_layers;
    else
      return false;
  }

  /// The whole batch at once, without a state: logits and hidden states.
  void forward() {
    auto& ctx = this_thread_context<Device>();
    ArenaScope scope(ctx.arena());
    const std::vector<Index> offsets = run_.offsets();
    const Index tokens = run_.batch * run_.length;
    const Sequences sequences{ctx.readable(offsets.data(), run_.batch + 1), nullptr, run_.batch, tokens, run_.length};
    const auto s = Net::template forward<A>(ctx, run_.model.parameters(), ctx.readable(run_.ids.data(), tokens),
                                            sequences, typename StateType::Views{}, Keep::layer_inputs);
    const auto h = ctx.arena().template tensor<A>(tokens, Net::d_model);
    const auto rstd = ctx.arena().template tensor<F>(tokens);
    const auto logits = ctx.arena().template tensor<A>(tokens, Net::vocabulary);
    rms_norm(ctx, s.x, {}, run_.model.parameters().final_norm, Net::norm_eps, h, rstd);
    Net::logits(ctx, run_.model.parameters(), Matrix<const A>(s.x), logits);
    run_.report.add("logits", run_.error("logits", Run::to_host(logits.data, logits.size())), run_.bounds.logits,
                    "without a state");

    Group group;
    std::vector<const A*> hidden;
    for (const auto& x : s.stack.x) hidden.push_back(x.data);
    if (hidden_states_leave()) {
      hidden.erase(hidden.begin());
      hidden.push_back(s.x.data);
    }
    hidden.push_back(h.data);
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      const std::string name = "hidden_states." + std::to_string(i);
      if (run_.reference.find(name))
        group.add(name, run_.error(name, Run::to_host(hidden[i], h.size())), run_.bounds.hidden_states);
    }
    group.report(run_.report, "hidden_states");
  }

  /// The batch through a state, cut at the given positions: logits of all positions and the state that is left.
  void extend(const std::vector<Index>& ends, const std::string& how) {
    StateType state = run_.model.new_state({run_.batch, run_.length});
    Values all(static_cast<std::size_t>(run_.batch * run_.length * Net::vocabulary));
    std::vector<StateValues> before_last;
    for (Index begin = 0; const Index end : ends) {
      const Index count = std::min(end, run_.length) - begin;
      if (count <= 0) continue;
      if (begin > 0 && begin + 1 == run_.length) before_last = values_of(state);
      const Values logits = append(state, run_.ids, run_.length, begin, count, Positions::all);
      for (Index row = 0; row < run_.batch; ++row)
        std::copy_n(logits.begin() + row * count * Net::vocabulary, count * Net::vocabulary,
                    all.begin() + (row * run_.length + begin) * Net::vocabulary);
      begin += count;
    }
    run_.report.add("logits, " + how, run_.error("logits", all), run_.bounds.logits);
    std::vector<StateValues> values = values_of(state);
    for (std::size_t i = 0; i < before_last.size(); ++i)
      if (values[i].name.ends_with(".conv")) values[i] = with_oldest(before_last[i], values[i], run_.batch);
    compare_caches(run_.reference, values, run_.batch, ", " + how, run_.bounds.caches, run_.report);
  }

  std::vector<StateValues> values_of(const StateType& state) const {
    std::vector<StateValues> values;
    auto views = state.views();
    visit_state<Net>(views, [&](const Name& name, auto& tensor, Index rows, Index width) {
      using Element = std::remove_reference_t<decltype(*tensor.data)>;
      if (rows == per_position) rows = state.length();
      std::vector<Element> part(static_cast<std::size_t>(rows * width));
      StateValues& ours = values.emplace_back(StateValues{name.str(), rows, width, {}});
      for (Index row = 0; row < run_.batch; ++row) {
        Memory<Device>::copy_to_host(part.data(), tensor[row].data, part.size() * sizeof(Element));
        for (const Element v : part) ours.values.push_back(static_cast<double>(static_cast<F>(v)));
      }
    });
    return values;
  }

  /// Appends `count` tokens to every row, from position `begin` of rows of `length` tokens.
  Values append(StateType& state, const std::vector<Token>& ids, Index length, Index begin, Index count,
                Positions positions) {
    std::vector<Token> tokens;
    for (Index row = 0; row < run_.batch; ++row)
      tokens.insert(tokens.end(), ids.begin() + row * length + begin, ids.begin() + row * length + begin + count);
    const std::vector<Index> lengths(static_cast<std::size_t>(run_.batch), count);
    const auto logits = run_.model.extend(state, {tokens, lengths}, positions);
    return Run::to_host(logits.data, logits.size());
  }

  /// The greedy continuation, token by token through the state.
  void greedy() {
    if (!run_.reference.find("greedy_ids")) return;
    Index batch = 0, length = 0;
    const std::vector<Token> wanted = run_.reference.ids("greedy_ids", batch, length);
    require(batch == run_.batch && length > run_.length, "reference.safetensors: greedy_ids must continue input_ids");
    std::vector<Token> ids = wanted;
    for (Index row = 0; row < run_.batch; ++row)
      std::copy_n(run_.ids.begin() + row * run_.length, run_.length, ids.begin() + row * length);
    StateType state = run_.model.new_state({run_.batch, length});
    Values logits = append(state, ids, length, 0, run_.length, Positions::last);
    double shortfall = 0;
    Index different = 0;
    for (Index at = run_.length; at < length; ++at) {
      for (Index row = 0; row < run_.batch; ++row) {
        const auto first = logits.begin() + row * Net::vocabulary,
                   best = std::max_element(first, first + Net::vocabulary);
        Token& id = ids[static_cast<std::size_t>(row * length + at)];
        const double norm = std::sqrt(std::inner_product(first, first + Net::vocabulary, first, 0.0));
        const bool valid = id >= 0 && id < Net::vocabulary;
        shortfall = std::max(shortfall, valid ? (*best - *(first + id)) / norm : 1.0);
        different += id != static_cast<Token>(best - first);
        if (run_.bounds.greedy_identical) id = static_cast<Token>(best - first);
      }
      logits = append(state, ids, length, at, 1, Positions::last);
    }
    const auto wrong =
        std::inner_product(ids.begin(), ids.end(), wanted.begin(), Index{0}, std::plus<>(), std::not_equal_to<>());
    if (run_.bounds.greedy_identical)
      run_.report.add("greedy_ids", static_cast<double>(wrong), 0, "tokens that differ");
    else
      run_.report.add("greedy_ids", wrong > 0 ? std::numeric_limits<double>::infinity() : shortfall, run_.bounds.logits,
                      "what the reference's choice lacks to the best logit; " + std::to_string(different) + " of " +
                          std::to_string(run_.batch * (length - run_.length)) + " tokens differ");
  }

  Run& run_;
};

}  // namespace zamba::testing::detail
