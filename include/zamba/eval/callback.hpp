// SPDX-License-Identifier: MIT
// What an evaluation calls while it works: a program draws a line of progress, or ends the work.
#pragma once

#include <concepts>

#include <zamba/device.hpp>

namespace zamba {

/// Called as callback(done, all) with the numbers of windows or items; false ends the work with an Error.
template <class F>
concept EvaluationCallback = std::invocable<F&, Index, Index> && requires(F& f) {
  { f(Index{}, Index{}) } -> std::convertible_to<bool>;
};

/// The callback that lets the work go on.
struct GoOn {
  bool operator()(Index, Index) const { return true; }
};

}  // namespace zamba
