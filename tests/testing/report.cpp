// SPDX-License-Identifier: MIT
// Report passes when every figure is within its bound, and only then.
#include <zamba/testing/report.hpp>

#include <limits>

#include <doctest/doctest.h>

using zamba::testing::relative_error;
using zamba::testing::Report;

TEST_CASE("report: passed when there is a line and every line is within its bound") {
  Report report("title");
  CHECK_FALSE(report.passed());  // nothing was checked
  report.add("first", 0.5, 1);
  report.add("at the bound", 1, 1);
  report.expect("holds", true);
  CHECK(report.passed());
  CHECK(static_cast<bool>(report));
  CHECK(report.lines().size() == 3);
  report.add("second", 1.5, 1);
  CHECK_FALSE(report.passed());
}

TEST_CASE("report: a NaN, a negative condition and an infinity do not pass") {
  for (const double error : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    Report report("title");
    report.add("figure", error, 1e300);
    CHECK_FALSE(report.passed());
  }
  Report unbounded("title");
  unbounded.add("figure", 0, std::nan(""));
  CHECK_FALSE(unbounded.passed());
  Report report("title");
  report.expect("condition", false);
  CHECK_FALSE(report.passed());
}

TEST_CASE("report: the text names each line, its figures and its note") {
  Report report("a check");
  report.add("logits", 0.25, 0.5);
  report.add("loss", 2, 1, "a note");
  CHECK(report.text() ==
        "a check: FAILED, 2 checks, 1 failed\n"
        "  ok     logits: 0.25 (at most 0.5)\n"
        "  FAILED loss: 2 (at most 1)  a note\n");
}

TEST_CASE("report: relative_error") {
  using Values = std::vector<double>;
  CHECK(relative_error(Values{3, 4}, Values{3, 4}) == 0);
  CHECK(relative_error(Values{3, 5}, Values{3, 4}) == doctest::Approx(0.2));
  CHECK(relative_error(Values{3, 4}, Values{0, 0}) == doctest::Approx(5));
  CHECK(std::isnan(relative_error(Values{1}, Values{1, 2})));
  CHECK(std::isnan(relative_error(Values{std::nan("")}, Values{1})));
  CHECK(std::isnan(relative_error(Values{1}, Values{std::nan("")})));
  for (const double scale : {1e-300, 1e-200, 1e200, 1e307}) {  // their squares are no numbers, or 0
    CHECK(relative_error(Values{3 * scale, 5 * scale}, Values{3 * scale, 4 * scale}) ==
          doctest::Approx(0.2).epsilon(1e-3));
    CHECK(relative_error(Values{scale}, Values{0}) == doctest::Approx(scale).epsilon(1e-3));
  }
}
