// SPDX-License-Identifier: MIT
// What conformance compares: a sequence at once and cut, one gradient with another, gradients with differences.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <zamba/number.hpp>
#include <zamba/testing/block_rules.hpp>
#include <zamba/testing/block_run.hpp>
#include <zamba/testing/finite_differences.hpp>
#include <zamba/testing/report.hpp>
#include <zamba/testing/sanitized.hpp>

namespace zamba::testing::detail {

// Cutting changes only the order of sums of products; 1e-11 leaves room for a few hundred roundings of float64.
inline constexpr double rounding = 1e-11;
// Central differences with h = 1e-5 carry errors of h^2 and of 1e-16 / h, both about 1e-10, times the function's
// curvature.
inline constexpr double step = 1e-5, difference = 2e-6;

/// The larger error; a NaN stays.
inline double worse(double a, double b) { return is_nan(a) || a >= b ? a : b; }

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

/// The relative error of those elements of two states that both passes wrote: what stayed NaN holds nothing.
inline double written_error(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> of_a, of_b;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (!is_nan(a[i]) && !is_nan(b[i])) of_a.push_back(a[i]), of_b.push_back(b[i]);
  return relative_error(of_a, of_b);
}

/// `count` tokens of a point, from token `first`.
inline BlockPoint tokens_of(const BlockPoint& point, Index first, Index count, Index d) {
  BlockPoint part{point.parameters, {}, {}, point.state};
  part.x.assign(point.x.begin() + first * d, point.x.begin() + (first + count) * d);
  part.t.assign(point.t.begin() + first * d, point.t.begin() + (first + count) * d);
  return part;
}

/// The elements of a state that belong to a row.
inline std::vector<double> row_of(const std::vector<double>& state, const std::vector<Index>& rows, Index row) {
  std::vector<double> part;
  for (std::size_t i = 0; i < state.size(); ++i)
    if (rows[i] == row) part.push_back(state[i]);
  return part;
}

/// One row at once, and the same cut: the greatest differences.
template <class Run>
class Cuts {
 public:
  /// The last two tokens of the point only follow, to show what a state is worth.
  Cuts(Run& run, const BlockPoint& point)
      : run_(run), point_(point), tokens_(static_cast<Index>(point.x.size()) / Run::d - 2) {
    whole_ = run_.forward(tokens_of(point_, 0, tokens_, Run::d), {{tokens_}, {0}});
    after_ = following(whole_.state);
  }

  const BlockResult& whole() const { return whole_; }

  void cut(const std::vector<Index>& lengths) {
    BlockResult all{{}, point_.state};
    Index first = 0;
    for (const Index length : lengths) {
      auto piece = tokens_of(point_, first, length, Run::d);
      piece.state = all.state;
      const auto result = run_.forward(piece, {{length}, {first}});
      all.out.insert(all.out.end(), result.out.begin(), result.out.end());
      all.state = result.state;
      first += length;
    }
    out_ = worse(out_, relative_error(all.out, whole_.out));
    state_ = worse(state_, written_error(all.state, whole_.state));
    state_ = worse(state_, relative_error(following(all.state), after_));
  }
  void cut_every(Index length) {
    std::vector<Index> lengths(static_cast<std::size_t>(tokens_ / length), length);
    if (tokens_ % length > 0) lengths.push_back(tokens_ % length);
    cut(lengths);
  }

  /// Lines of what was cut since the last one. A NaN comes from what was not written.
  void report(RuleReport& report, const BlockRule& rule, const std::string& name, double bound) {
    report.add(std::isnan(out_) ? block_rules::unused : rule, name + ": output", out_, bound);
    report.add(std::isnan(state_) ? block_rules::unused : rule, name + ": state", state_, bound);
    out_ = state_ = 0;
  }

 private:
  std::vector<double> following(const std::vector<double>& state) {
    auto piece = tokens_of(point_, tokens_, 2, Run::d);
    piece.state = state;
    return run_.forward(piece, {{2}, {tokens_}}).out;
  }

  Run& run_;
  BlockPoint point_;
  Index tokens_;
  BlockResult whole_;
  std::vector<double> after_;
  double out_ = 0, state_ = 0;
};

/// The sum of a pass's results, each times a random number: what gradients are taken of.
template <class Run>
class Objective {
 public:
  /// The state's gradient is 0 where nothing was written.
  Objective(Run& run, const BlockPoint& point, const BlockRows& rows) : run_(run), rows_(rows) {
    cotangent = run_.forward(point, rows_);
    Random random(Seed{21}, 0);
    for (double& value : cotangent.out) value = random.normal();
    for (double& value : cotangent.state) value = is_nan(value) ? 0 : random.normal();
  }

  double operator()(const BlockPoint& point) {
    const auto result = run_.forward(point, rows_);
    double sum = dot(result.out, cotangent.out);
    for (std::size_t i = 0; i < result.state.size(); ++i)
      if (cotangent.state[i] != 0) sum += result.state[i] * cotangent.state[i];
    return sum;
  }

  BlockPoint gradients(const BlockPoint& point, const BlockManner& manner = {Keep::everything}) {
    return run_.gradients(point, rows_, cotangent, manner);
  }

  BlockResult cotangent;

 private:
  Run& run_;
  BlockRows rows_;
};

/// Part `values` of a point, elements [first, first + count): central differences along single elements, at most `most`
/// of them, against `gradient`. Elements that are NaN are left alone.
template <class Run>
double element_error(Objective<Run>& objective, BlockPoint& point, std::vector<double> BlockPoint::*values,
                     const BlockPoint& gradient, Index first, Index count, Index most) {
  std::vector<double> measured, given;
  const Index stride = std::max<Index>(1, count / unless_sanitized<Index>(most, 3));
  for (Index i = first; i < first + count; i += stride) {
    const auto at = static_cast<std::size_t>(i);
    double& value = (point.*values)[at];
    if (is_nan(value)) continue;
    measured.push_back(finite_difference(value, step, [&] { return objective(point); }));
    given.push_back((gradient.*values)[at]);
  }
  return relative_error(given, measured);
}

/// The same along one direction: that of the gradient itself, so that little cancels, plus a random one as long.
template <class Run>
double direction_error(Objective<Run>& objective, const BlockPoint& point, std::vector<double> BlockPoint::*values,
                       const BlockPoint& gradient, Index first, Index count) {
  const auto begin = static_cast<std::size_t>(first), end = begin + static_cast<std::size_t>(count);
  Random random(Seed{22}, 0);
  double squares = 0, given = 0;
  const auto written = [&](std::size_t at) { return !is_nan((point.*values)[at]); };
  for (std::size_t at = begin; at < end; ++at)
    if (written(at)) squares += std::pow((gradient.*values)[at], 2);
  if (squares == 0) squares = 1;
  std::vector<double> along(end - begin);
  for (std::size_t at = begin; at < end; ++at) {
    if (!written(at)) continue;
    const double slope = (gradient.*values)[at];
    along[at - begin] = slope / std::sqrt(squares) + random.normal() / std::sqrt(static_cast<double>(count));
    given += slope * along[at - begin];
  }
  const double measured = central_difference(step, [&](double move) {
    BlockPoint moved = point;
    for (std::size_t at = begin; at < end; ++at) (moved.*values)[at] += move * along[at - begin];
    return objective(moved);
  });
  return relative_error(std::vector<double>{given}, std::vector<double>{measured});
}

/// A point of so many tokens whose parameters are halved until no result of the pass is large: what a block magnifies
/// with every token overflows float32 in a long row.
template <class Run>
BlockPoint settled_point(Run& run, Index tokens) {
  BlockPoint point = run.random_point(tokens);
  for (int halvings = 0; halvings < 12; ++halvings) {
    const auto result = run.forward(point, {{tokens}, {0}});
    const auto small = [](double value) { return std::abs(value) < 1e4; };
    if (std::all_of(result.out.begin(), result.out.end(), small)) break;
    for (double& value : point.parameters) value /= 2;
  }
  return point;
}

/// Two rows, of which the first has a past of `before` tokens in its state; the second one's state is not written yet.
template <class Run>
BlockPoint point_with_past(Run& two, const BlockPoint& point, Index before, Index tokens) {
  BlockPoint base = tokens_of(point, before, tokens, Run::d);
  BlockPoint past = tokens_of(point, 0, before, Run::d);
  past.state = two.unwritten_state();
  base.state = two.forward(past, {{before, 0}, {0, 0}}).state;
  return base;
}

}  // namespace zamba::testing::detail
