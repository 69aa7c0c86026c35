// SPDX-License-Identifier: MIT
// LearningRate: the learning rate as a function of the tokens seen in a phase of training, held as data.
//
// A schedule is a row of pieces, each going from one value to another over a number of tokens or a share of the phase;
// the last one takes what is left. With t in [0, 1] the position within a piece:
//   constant     from
//   linear       from + (to - from) t
//   cosine       to + (from - to) (1 + cos(pi t)) / 2
//   exponential  from (to / from)^t
// Zamba's two phases (arXiv 2405.16712; the second warmed up again to about 75 % of the peak):
//   auto pretraining = LearningRate::warm_up(1.5e-4, {.fraction = 0.01}).then(LearningRate::cosine(1.5e-4, 7.5e-5));
//   auto annealing = LearningRate::linear(7.5e-5, 1.1e-4).over({.fraction = 0.02})
//                        .then(LearningRate::exponential(1.1e-4, 1e-6));
// Ends are exact: the first token of a piece gets `from`, the end of the phase gets `to`, bit by bit.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/number.hpp>

namespace zamba {

/// How long a piece lasts: a number of tokens or a share of the phase, one of the two.
struct ScheduleLength {
  Index tokens = 0;
  double fraction = 0;

  bool operator==(const ScheduleLength&) const = default;
};

/// A plain value: copy it, compare it, print it, and compare the text when a run is resumed.
class LearningRate {
 public:
  static LearningRate constant(double value) { return LearningRate(Form::constant, value, value); }
  static LearningRate linear(double from, double to) { return LearningRate(Form::linear, from, to); }
  static LearningRate cosine(double from, double to) { return LearningRate(Form::cosine, from, to); }
  /// Both ends must be positive: an exponential never reaches 0.
  static LearningRate exponential(double from, double to) {
    const LearningRate result(Form::exponential, from, to);
    require(from > 0 && to > 0, "LearningRate: exponential needs both ends above 0, got ", from, " to ", to,
            "; linear or cosine reach 0");
    require(is_finite(to / from) && to / from > 0, "LearningRate: exponential from ", from, " to ", to,
            " has ends so far apart that their ratio is no number");
    return result;
  }
  /// Linear from `from` to `peak`.
  static LearningRate warm_up(double peak, ScheduleLength length, double from = 0) {
    return linear(from, peak).over(length);
  }

  /// The largest rate of the schedule.
  double peak() const {
    double largest = 0;
    for (const Piece& piece : pieces_) largest = std::max({largest, piece.from, piece.to});
    return largest;
  }

  /// The same schedule with the length of its last piece given. After it, its final value holds.
  LearningRate over(ScheduleLength length) const {
    require(is_finite(length.fraction) && length.tokens >= 0 && (length.tokens > 0) != (length.fraction != 0),
            "LearningRate: a length is either a positive number of tokens or a fraction, got tokens ", length.tokens,
            " and fraction ", length.fraction);
    require(length.tokens > 0 || (length.fraction > 0 && length.fraction <= 1),
            "LearningRate: a fraction of the phase is above 0 and at most 1, got ", length.fraction);
    LearningRate result = *this;
    result.pieces_.back().length = length;
    return result;
  }

  /// This schedule, then the next one.
  LearningRate then(const LearningRate& next) const {
    if (pieces_.back().length == ScheduleLength{})
      fail("LearningRate: give '", text(pieces_.back()), "' a length with over() before something follows it");
    LearningRate result = *this;
    result.pieces_.insert(result.pieces_.end(), next.pieces_.begin(), next.pieces_.end());
    return result;
  }

  /// Throws unless every piece has room in a phase of so many tokens.
  void check(Index phase_tokens) const {
    require(phase_tokens > 0, "LearningRate: a phase has at least one token, got ", phase_tokens);
    double end = 0;
    for (const Piece& piece : pieces_) {
      // Not require(): its message would be composed, and allocated, at every step.
      if (end >= static_cast<double>(phase_tokens))
        fail("LearningRate: nothing of a phase of ", phase_tokens, " tokens is left for '", text(piece), "' in '",
             str(), "'");
      end += tokens_of(piece, end, phase_tokens);
    }
    if (end > static_cast<double>(phase_tokens) * (1 + 1e-12))  // fractions that add up to 1 but for rounding
      fail("LearningRate: '", str(), "' needs ", end, " tokens, but its phase has ", phase_tokens);
  }

  /// The learning rate once `token` tokens of a phase of `phase_tokens` have been seen.
  double at(Index token, Index phase_tokens) const {
    check(phase_tokens);
    require(token >= 0 && token <= phase_tokens, "LearningRate: token ", token, " is outside a phase of ", phase_tokens,
            " tokens");
    const double position = static_cast<double>(token);
    double begin = 0;
    for (std::size_t i = 0; i + 1 < pieces_.size(); ++i) {
      const double length = tokens_of(pieces_[i], begin, phase_tokens);
      if (position < begin + length) return value(pieces_[i], (position - begin) / length);
      begin += length;
    }
    return value(pieces_.back(), (position - begin) / tokens_of(pieces_.back(), begin, phase_tokens));
  }

  /// For logs, and equal exactly where the schedules are: "linear 0 to 0.00015 over 1000 tokens, cosine ...".
  std::string str() const {
    std::string result;
    for (const Piece& piece : pieces_) result += (result.empty() ? "" : ", ") + text(piece);
    return result;
  }

  bool operator==(const LearningRate&) const = default;

 private:
  enum class Form { constant, linear, cosine, exponential };

  struct Piece {
    Form form = Form::constant;
    double from = 0, to = 0;
    ScheduleLength length;  // neither tokens nor fraction: the rest of the phase

    bool operator==(const Piece&) const = default;
  };

  LearningRate(Form form, double from, double to) : pieces_{{form, from, to, {}}} {
    require(is_finite(from) && is_finite(to) && from >= 0 && to >= 0, "LearningRate: ", name(form),
            " needs finite values of 0 or more, got ", from, " to ", to);
  }

  static const char* name(Form form) {
    constexpr const char* names[] = {"constant", "linear", "cosine", "exponential"};
    return names[static_cast<int>(form)];
  }

  static double tokens_of(const Piece& piece, double begin, Index phase_tokens) {
    if (piece.length.tokens > 0) return static_cast<double>(piece.length.tokens);
    if (piece.length.fraction > 0) return piece.length.fraction * static_cast<double>(phase_tokens);
    return static_cast<double>(phase_tokens) - begin;
  }

  static double value(const Piece& piece, double t) {
    if (t >= 1) return piece.to;
    if (piece.form == Form::cosine) return std::lerp(piece.to, piece.from, (1 + std::cos(std::numbers::pi * t)) / 2);
    if (piece.form == Form::exponential) return piece.from * std::pow(piece.to / piece.from, t);
    return std::lerp(piece.from, piece.to, t);
  }

  /// The shortest digits that read back as the same double.
  static std::string digits(double value) {
    char buffer[32];
    return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr};
  }

  static std::string text(const Piece& piece) {
    std::string result = name(piece.form) + (" " + digits(piece.from));
    if (piece.form != Form::constant) result += " to " + digits(piece.to);
    if (piece.length.tokens > 0) result += " over " + std::to_string(piece.length.tokens) + " tokens";
    if (piece.length.fraction > 0) result += " over " + digits(piece.length.fraction) + " of the phase";
    return result;
  }

  std::vector<Piece> pieces_;  // at least one
};

}  // namespace zamba
