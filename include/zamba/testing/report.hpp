// SPDX-License-Identifier: MIT
// Report: what a check compared, how far apart it was, and what was allowed.
#pragma once

#include <algorithm>
#include <cmath>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include <zamba/number.hpp>

namespace zamba::testing {

/// The lines of a check; printable; passed() when every line passed and there is at least one.
class Report {
 public:
  struct Line {
    std::string name;
    double error;  // NaN: could not be computed, which never passes
    double bound;
    std::string note;
    bool passed() const { return !is_nan(error) && !is_nan(bound) && error <= bound; }
  };

  explicit Report(std::string title) : title_(std::move(title)) {}

  /// Records a figure that must be at most `bound`.
  void add(std::string name, double error, double bound, std::string note = {}) {
    lines_.push_back({std::move(name), error, bound, std::move(note)});
  }
  /// Records a condition that must hold.
  void expect(std::string name, bool condition, std::string note = {}) {
    add(std::move(name), condition ? 0 : 1, 0, std::move(note));
  }

  bool passed() const {
    return !lines_.empty() && std::all_of(lines_.begin(), lines_.end(), [](const Line& line) { return line.passed(); });
  }
  explicit operator bool() const { return passed(); }
  const std::vector<Line>& lines() const { return lines_; }

  std::string text() const {
    std::ostringstream out;
    out << *this;
    return out.str();
  }
  friend std::ostream& operator<<(std::ostream& out, const Report& report) {
    const auto failed =
        std::count_if(report.lines_.begin(), report.lines_.end(), [](const Line& l) { return !l.passed(); });
    out << report.title_ << ": " << (report.passed() ? "passed" : "FAILED") << ", " << report.lines_.size()
        << " checks, " << failed << " failed\n";
    for (const Line& line : report.lines_) {
      out << (line.passed() ? "  ok     " : "  FAILED ") << line.name << ": " << line.error << " (at most "
          << line.bound << ")";
      if (!line.note.empty()) out << "  " << line.note;
      out << '\n';
    }
    return out;
  }

 private:
  std::string title_;
  std::vector<Line> lines_;
};

/// ||a - b|| / ||b||, and ||a|| where b is zero. NaN where either holds one. A b whose norm is less than `least` is
/// measured as if it had that one.
template <class A, class B>
double relative_error(const A& a, const B& b, double least = 0) {
  double largest = 0, difference = 0, norm = 0;
  if (a.size() != b.size()) return std::nan("");
  for (std::size_t i = 0; i < a.size(); ++i)
    largest = std::max({largest, std::abs(double(a[i])), std::abs(double(b[i]))});
  // A power of two near 1 / largest: no square overflows, nor does that of the largest vanish.
  const double unit = std::ldexp(1, -std::clamp(std::ilogb(largest), -1000, 1000));
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = double(a[i]) * unit, y = double(b[i]) * unit;
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  norm = std::max(norm, least * unit * least * unit);
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference) / unit;
}

}  // namespace zamba::testing
