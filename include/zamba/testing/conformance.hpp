// SPDX-License-Identifier: MIT
// conformance<B>(): checks a block of the library's or of your own, in float64 on the CPU.
//
//   - its listing: names are unique, sizes add up to parameter_count
//   - one sequence cut in every way, token by token among them, gives the same output and state
//   - a ragged batch equals its rows alone; what a fresh state holds (NaN here) is never read
//   - a token changes nothing before it, bit by bit
//   - backward equals central finite differences: of every parameter, of x and t, of the initial state
//
// A shared block is checked as one use of it, with the parameters of that use.
#pragma once

#include <limits>
#include <set>

#include <zamba/model.hpp>
#include <zamba/shared_use.hpp>
#include <zamba/testing/report.hpp>

namespace zamba::testing {

namespace detail {

/// A block with random float64 weights, run on vectors of its own.
template <class B>
class BlockRun {
 public:
  static constexpr Index d = B::d_model;
  static constexpr bool shared = requires { requires B::shared; };
  using Params = typename B::template Parameters<double, double>;
  using ConstParams = typename B::template Parameters<const double, const double>;
  using State = typename B::template State<double, double>;

  /// Everything a pass starts from, flat: parameters, x, t, and the state before it.
  struct Point {
    std::vector<double> parameters, x, t, state;
  };
  struct Result {
    std::vector<double> out, state;
  };

  explicit BlockRun(Index rows, Index room) : rows_(rows), room_(room), ctx_(1) {
    entries_ = zamba::detail::list_parameters<B, double>();
    State state;
    zamba::visit_state<B>(state, [&](const Name&, auto&, Index per_row, Index width) {
      state_size_ += rows_ * (per_row == per_position ? room_ : per_row) * width;
    });
  }

  const std::vector<ParameterEntry>& entries() const { return entries_; }

  Point random_point(Index tokens) const {
    Random random(Seed{20}, 0);
    const auto normal = [&](Index n) {
      std::vector<double> values(static_cast<std::size_t>(n));
      for (double& value : values) value = random.normal();
      return values;
    };
    Point point{normal(entries_.back().offset + entries_.back().size), normal(tokens * d), normal(tokens * d),
                normal(state_size_)};
    for (double& value : point.parameters) value *= 0.4;
    return point;
  }

  /// Tokens of the rows, each continuing at its start; the state is rewritten.
  Result forward(const Point& point, const std::vector<Index>& lengths, const std::vector<Index>& starts) {
    Result result{std::vector<double>(point.x.size()), point.state};
    ArenaScope scope(ctx_.arena());
    run(point, lengths, starts, result, Keep::nothing);
    return result;
  }

  /// Gradients of sum(out * d_out) + sum(state * d_state): of every part of the point.
  Point gradients(const Point& point, const std::vector<Index>& lengths, const std::vector<Index>& starts,
                  const Result& cotangent, Keep keep) {
    Result result{std::vector<double>(point.x.size()), point.state};
    Point gradient{std::vector<double>(point.parameters.size()), std::vector<double>(point.x.size()),
                   std::vector<double>(point.t.size()), cotangent.state};
    ArenaScope scope(ctx_.arena());
    const auto saved = run(point, lengths, starts, result, keep);
    Params d_parameters;
    bind(d_parameters, gradient.parameters);
    const Index tokens = sequences_.tokens;
    Matrix<double> d_x(gradient.x.data(), tokens, d), d_t(gradient.t.data(), tokens, d);
    std::vector<double> d_out = cotangent.out;
    Matrix<double> d(d_out.data(), tokens, B::d_model);
    const State state = bind_state(result.state), d_state = bind_state(gradient.state);
    if constexpr (shared)
      B::backward(ctx_, parameters_, d_parameters, saved, stream(point, result), Matrix<const double>(d), d_x, d_t,
                  sequences_, state, d_state);
    else {
      B::backward(ctx_, parameters_, d_parameters, saved, stream(point, result), d, d_t, sequences_, state, d_state);
      gradient.x = d_out;
    }
    return gradient;
  }

  Index state_size() const { return state_size_; }
  /// The row and position of a state element, position -1 for what is not per position.
  std::vector<std::pair<Index, Index>> state_places() const {
    std::vector<std::pair<Index, Index>> places;
    State state;
    zamba::visit_state<B>(state, [&](const Name&, auto&, Index per_row, Index width) {
      const Index count = per_row == per_position ? room_ : per_row;
      for (Index row = 0; row < rows_; ++row)
        for (Index i = 0; i < count * width; ++i) places.emplace_back(row, per_row == per_position ? i / width : -1);
    });
    return places;
  }

 private:
  Stream<double> stream(const Point& point, Result& result) const {
    const Index tokens = static_cast<Index>(point.x.size()) / d;
    return {{point.x.data(), tokens, d}, {point.t.data(), tokens, d}, {result.out.data(), tokens, d}};
  }

  auto run(const Point& point, const std::vector<Index>& lengths, const std::vector<Index>& starts, Result& result,
           Keep keep) {
    offsets_.assign(1, 0);
    for (const Index length : lengths) offsets_.push_back(offsets_.back() + length);
    starts_ = starts;
    sequences_ = {offsets_.data(), starts_.data(), rows_, offsets_.back(),
                  *std::max_element(lengths.begin(), lengths.end())};
    bind(parameters_, point.parameters);
    return B::forward(ctx_, parameters_, stream(point, result), sequences_, bind_state(result.state), keep);
  }

  template <class P, class Values>
  void bind(P& parameters, Values& values) {
    using Byte = std::conditional_t<std::is_const_v<Values>, const std::byte, std::byte>;
    zamba::detail::bind_parameters<B>(
        parameters, [&](std::size_t i) { return reinterpret_cast<Byte*>(values.data() + entries_[i].offset); });
  }

  State bind_state(std::vector<double>& values) const {
    State state;
    Index at = 0;
    zamba::visit_state<B>(state, [&](const Name&, auto& tensor, Index per_row, Index width) {
      const Index count = per_row == per_position ? room_ : per_row;
      tensor = {values.data() + at, rows_, count, width};
      at += rows_ * count * width;
    });
    return state;
  }

  Index rows_, room_, state_size_ = 0;
  Context<cpu> ctx_;
  std::vector<ParameterEntry> entries_;
  ConstParams parameters_;
  std::vector<Index> offsets_, starts_;
  Sequences sequences_;
};

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

/// Central differences of f along single elements, at most `most` of them, against `gradient`.
template <class F>
double difference_error(std::vector<double>& values, const std::vector<double>& gradient, Index first, Index count,
                        F&& f, Index most = 24) {
  std::vector<double> measured, given;
  const Index stride = std::max<Index>(1, count / most);
  for (Index i = first; i < first + count; i += stride) {
    const double kept = values[i], h = 1e-5;
    values[i] = kept + h;
    const double above = f();
    values[i] = kept - h;
    const double below = f();
    values[i] = kept;
    measured.push_back((above - below) / (2 * h));
    given.push_back(gradient[i]);
  }
  return relative_error(given, measured);
}

}  // namespace detail

/// Checks a block as listed at the top of this file. Takes a second or so for a block of d_model below 64.
template <class Given>
Report conformance() {
  using B = std::conditional_t<detail::BlockRun<Given>::shared, SharedUse<Given>, Given>;
  // Cutting changes only the order of sums of products; 1e-11 leaves room for a few hundred roundings of float64.
  constexpr double rounding = 1e-11;
  // Central differences with h = 1e-5 carry errors of h^2 and of 1e-16 / h, both about 1e-10, times the function's
  // curvature.
  constexpr double difference = 2e-6;
  constexpr Index tokens = 11, room = 16, before = 3;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Report report("conformance");
  using Run = detail::BlockRun<B>;
  Run one(1, room);

  std::set<std::string> names;
  Index size = 0;
  for (const ParameterEntry& entry : one.entries()) {
    names.insert(entry.name);
    size += entry.size;
  }
  report.expect("parameter names are unique", names.size() == one.entries().size());
  report.expect("listed sizes add up to parameter_count", size == parameter_count<B>);

  const auto part = [&](const typename Run::Point& point, Index first, Index count) {
    auto piece = point;
    piece.x.assign(point.x.begin() + first * Run::d, point.x.begin() + (first + count) * Run::d);
    piece.t.assign(point.t.begin() + first * Run::d, point.t.begin() + (first + count) * Run::d);
    return piece;
  };
  /// The state's meaningful part after `length` positions; the rest may hold anything.
  const auto meaningful = [](Run& run, std::vector<double> state, Index length) {
    const auto places = run.state_places();
    for (std::size_t i = 0; i < state.size(); ++i)
      if (places[i].second >= length) state[i] = 0;
    return state;
  };

  auto point = one.random_point(tokens);
  std::fill(point.state.begin(), point.state.end(), nan);
  const auto whole = one.forward(point, {tokens}, {0});
  const auto whole_state = meaningful(one, whole.state, tokens);
  double split_out = 0, split_state = 0;
  const auto cut = [&](const std::vector<Index>& lengths) {
    auto state = point.state;
    std::vector<double> out;
    Index first = 0;
    for (const Index length : lengths) {
      auto piece = part(point, first, length);
      piece.state = state;
      const auto result = one.forward(piece, {length}, {first});
      out.insert(out.end(), result.out.begin(), result.out.end());
      state = result.state;
      first += length;
    }
    const double out_error = relative_error(out, whole.out);
    const double state_error = relative_error(meaningful(one, state, tokens), whole_state);
    split_out = out_error <= split_out ? split_out : out_error;  // a NaN stays
    split_state = state_error <= split_state ? split_state : state_error;
  };
  for (Index first = 1; first < tokens; ++first) {
    cut({first, tokens - first});
    for (Index second = 1; first + second < tokens; ++second) cut({first, second, tokens - first - second});
  }
  report.add("every split into two or three chunks: output", split_out, rounding);
  report.add("every split into two or three chunks: state", split_state, rounding);
  split_out = split_state = 0;
  cut(std::vector<Index>(tokens, 1));
  report.add("token by token: output", split_out, rounding);
  report.add("token by token: state", split_state, rounding);

  Index first_changed = tokens;
  for (Index token = 0; token < tokens; ++token) {
    auto changed = point;
    for (Index i = 0; i < Run::d; ++i) changed.x[token * Run::d + i] += 1;
    const auto result = one.forward(changed, {tokens}, {0});
    for (Index i = 0; i < token * Run::d; ++i)
      if (result.out[i] != whole.out[i]) first_changed = std::min(first_changed, token);
  }
  report.expect("causality, bit by bit", first_changed == tokens);

  {
    Run three(3, room);
    auto ragged = three.random_point(tokens);
    ragged.parameters = point.parameters;
    std::fill(ragged.state.begin(), ragged.state.end(), nan);
    const std::vector<Index> lengths{4, 0, tokens - 4};
    const auto together = three.forward(ragged, lengths, {0, 0, 0});
    std::vector<double> alone;
    for (Index row = 0, first = 0; row < 3; first += lengths[row++]) {
      if (lengths[row] == 0) continue;
      auto piece = part(ragged, first, lengths[row]);
      piece.state = point.state;
      const auto result = one.forward(piece, {lengths[row]}, {0});
      alone.insert(alone.end(), result.out.begin(), result.out.end());
    }
    report.add("a ragged batch equals its rows alone", relative_error(together.out, alone), rounding);
  }

  // Two rows, one with a past, so that the gradient passes through a state.
  Run two(2, room);
  auto base = two.random_point(tokens);
  const std::vector<Index> lengths{5, tokens - 5}, starts{before, 0};
  const auto forward = [&] { return two.forward(base, lengths, starts); };
  auto cotangent = forward();
  {
    Random random(Seed{21}, 0);
    const auto places = two.state_places();
    for (double& value : cotangent.out) value = random.normal();
    for (std::size_t i = 0; i < cotangent.state.size(); ++i) {
      const Index end = starts[places[i].first] + lengths[places[i].first];
      cotangent.state[i] = places[i].second < end ? random.normal() : 0;
    }
  }
  const auto value = [&] {
    const auto result = forward();
    return detail::dot(result.out, cotangent.out) + detail::dot(result.state, cotangent.state);
  };
  const auto gradient = two.gradients(base, lengths, starts, cotangent, Keep::everything);
  for (const ParameterEntry& entry : two.entries())
    report.add("d " + entry.name,
               detail::difference_error(base.parameters, gradient.parameters, entry.offset, entry.size, value),
               difference);
  const Index inputs = tokens * Run::d;
  report.add("d x", detail::difference_error(base.x, gradient.x, 0, inputs, value, 60), difference);
  report.add("d t", detail::difference_error(base.t, gradient.t, 0, inputs, value, 60), difference);
  if (two.state_size() > 0) {
    // Only what the pass reads: the past of row 0.
    const auto places = two.state_places();
    std::vector<double> measured, given;
    for (std::size_t i = 0; i < base.state.size(); ++i) {
      if (places[i].first != 0 || places[i].second >= before) continue;
      const double kept = base.state[i];
      base.state[i] = kept + 1e-5;
      const double above = value();
      base.state[i] = kept - 1e-5;
      const double below = value();
      base.state[i] = kept;
      measured.push_back((above - below) / 2e-5);
      given.push_back(gradient.state[i]);
    }
    report.add("d initial state", relative_error(given, measured), difference);
  }
  const auto again = two.gradients(base, lengths, starts, cotangent, Keep::everything);
  report.expect("a rerun of backward is bit-equal", again.parameters == gradient.parameters && again.x == gradient.x);
  const auto recomputed = two.gradients(base, lengths, starts, cotangent, Keep::layer_inputs);
  report.add("recomputing gives the same gradients", relative_error(recomputed.parameters, gradient.parameters),
             rounding);
  return report;
}

}  // namespace zamba::testing
