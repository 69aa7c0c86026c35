// SPDX-License-Identifier: MIT
// ParameterGroup: parameters that an optimiser steps at a rate of their own, or leaves as they are.
//
//   {.groups = {{.match = "*adapter*"}, {.match = "*", .frozen = true}}}          // only adapters are trained
//   {.groups = {{.match = "shared.*", .rate = 0.1}}}                              // the shared blocks, ten times
//   slower
//   {.groups = {{.match = [](const ParameterEntry& entry) { return entry.decay == Decay::no; }, .frozen = true}}}
//
// A parameter belongs to the first group that matches it; one that none matches is stepped at the learning rate itself.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/number.hpp>
#include <zamba/parameter_table.hpp>

namespace zamba {

namespace detail {

/// Whether a name is of a pattern, in which * stands for any characters, or none.
inline bool matches_pattern(std::string_view name, std::string_view pattern) {
  std::size_t n = 0, p = 0, star = std::string_view::npos,
              from = 0;  // the last star met, and where it ends in the name
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      from = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p, ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++from;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

}  // namespace detail

/// Which parameters are meant: those whose whole name is of a pattern, in which * stands for any characters, dots too;
/// or those that a function says.
class ParameterMatch {
 public:
  ParameterMatch(std::string pattern)
      : text_("'" + pattern + "'"), matches_([pattern = std::move(pattern)](const ParameterEntry& entry) {
          return detail::matches_pattern(entry.name, pattern);
        }) {}
  ParameterMatch(const char* pattern) : ParameterMatch(std::string(pattern)) {}
  template <class F>
    requires(!std::same_as<F, ParameterMatch> && std::predicate<F&, const ParameterEntry&>)
  ParameterMatch(F f) : text_("of a function"), matches_(std::move(f)) {}

  bool operator()(const ParameterEntry& entry) const { return matches_(entry); }
  /// False where it was made of an empty std::function.
  explicit operator bool() const { return static_cast<bool>(matches_); }
  /// For messages.
  const std::string& text() const { return text_; }

 private:
  std::string text_;
  std::function<bool(const ParameterEntry&)> matches_;
};

struct ParameterGroup {
  ParameterMatch match;
  double rate = 1;      // what the learning rate is multiplied by
  bool frozen = false;  // weights and moments stay as they are, and gradients do not count in the norm that clips
};

namespace detail {

/// What the learning rate is multiplied by for each parameter; 0: it is frozen. Throws for a group that makes no sense,
/// or would do nothing, naming it.
inline std::vector<double> group_rates(const std::vector<ParameterEntry>& entries,
                                       const std::vector<ParameterGroup>& groups) {
  std::vector<double> rates(entries.size(), 1);
  std::vector<bool> taken(entries.size());
  for (std::size_t number = 0; number < groups.size(); ++number) {
    const ParameterGroup& group = groups[number];
    const auto check = [&](bool good, const auto&... problem) {
      require(good, "AdamW: parameter group ", number + 1, ", ", group.match.text(), ", ", problem...);
    };
    check(static_cast<bool>(group.match), "which is empty, says of no parameter whether it is meant");
    check(is_finite(group.rate) && group.rate > 0, "has a rate of ", group.rate,
          ": what the learning rate is multiplied by must be finite and above 0; .frozen = true leaves parameters as "
          "they are");
    check(!group.frozen || group.rate == 1, "is frozen, and has a rate of ", group.rate, " that would do nothing");
    bool matched = false, own = false;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (!group.match(entries[i])) continue;
      matched = true;
      if (taken[i]) continue;
      own = taken[i] = true;
      rates[i] = group.frozen ? 0 : group.rate;
    }
    check(matched, "matches no parameter; their names are those of model.entries(), from '", entries.front().name,
          "' to '", entries.back().name, "'");
    check(own, "matches only parameters that groups before it match, and have");
  }
  require(std::any_of(rates.begin(), rates.end(), [](double rate) { return rate > 0; }),
          "AdamW: every parameter is frozen, so there is nothing to train");
  return rates;
}

}  // namespace detail
}  // namespace zamba
