// SPDX-License-Identifier: MIT
// The reference cases in tests/models: each passes completely.
#pragma once

#include <cstddef>
#include <string>

#include <doctest/doctest.h>

#include <zamba/testing/check_reference.hpp>

#include "cases.hpp"

namespace zamba_test {

/// The case in T, with so many lines: 19 where there are a recurrence and attention, 15 where there is one of them.
template <class Net, class T>
void passes(const std::string& name, std::size_t lines) {
  const auto report = zamba::testing::check_reference<Net, T>(case_path(name));
  MESSAGE(report);
  CHECK(report.passed());
  CHECK(report.lines().size() == lines);
}

}  // namespace zamba_test
