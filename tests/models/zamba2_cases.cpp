// SPDX-License-Identifier: MIT
// The reference cases of model_type zamba2, complete: in double, in float, and with weights stored as bfloat16.
// What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>.
#include <zamba/testing/check_reference.hpp>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>

using namespace zamba_test;

namespace {

template <class Net, class T>
void passes(const std::string& name) {
  const auto report = zamba::testing::check_reference<Net, T>(case_path(name));
  MESSAGE(report);
  CHECK(report.passed());
  CHECK(report.lines().size() == 19);
}

}  // namespace

TEST_CASE("zamba2_cases: zamba2 in double") { passes<Zamba2Case, double>("zamba2"); }
TEST_CASE("zamba2_cases: zamba2 in float") { passes<Zamba2Case, float>("zamba2"); }
TEST_CASE("zamba2_cases: zamba2 in bfloat16") { passes<Zamba2Case, bf16>("zamba2"); }
TEST_CASE("zamba2_cases: zamba2-two-blocks in double") { passes<Zamba2TwoBlocksCase, double>("zamba2-two-blocks"); }
TEST_CASE("zamba2_cases: zamba2-two-blocks in float") { passes<Zamba2TwoBlocksCase, float>("zamba2-two-blocks"); }
