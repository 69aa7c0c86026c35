// SPDX-License-Identifier: MIT
// Trouble: what went wrong beside a run and is not to end it: told at once, and thrown later.
#pragma once

#include <exception>
#include <ostream>
#include <string>
#include <utility>

#include <zamba/error.hpp>
#include <zamba/train/progress.hpp>

namespace zamba::detail {

class Trouble {
 public:
  /// out: where it is told; line: a progress line there, which is ended before. Either may be absent.
  explicit Trouble(std::ostream* out) : out_(out) {}

  /// f(), after so many steps; what it throws is kept.
  template <class F>
  void aside(Index step, ProgressLine* line, F&& f) {
    try {
      f();
    } catch (const std::exception& error) {
      if (!text_.empty()) {
        ++further_;
        return;
      }
      text_ = "after step " + std::to_string(step) + ": " + without_prefix(error.what());
      if (!out_) return;
      try {
        if (line) line->finish();
        *out_ << "Trainer: trouble " << text_ << "; the training goes on" << std::endl;
      } catch (const std::exception&) {  // a stream that throws may be the trouble itself
      }
    }
  }

  /// The first that was not taken yet; empty: none.
  const std::string& text() const { return text_; }
  /// That, and how many came after it, which are forgotten.
  std::string take() {
    const Index further = std::exchange(further_, 0);
    return std::exchange(text_, {}) + (further > 0 ? " (and " + std::to_string(further) + " more since then)" : "");
  }

 private:
  std::ostream* out_;
  std::string text_;
  Index further_ = 0;
};

}  // namespace zamba::detail
