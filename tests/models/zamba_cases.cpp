// SPDX-License-Identifier: MIT
// The reference cases of model_type zamba, complete: in double, in float, and with weights stored as bfloat16.
// What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>; the case zamba in
// double is in tests/testing/check_reference.cpp.
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

TEST_CASE("zamba_cases: zamba-gqa in double") { passes<ZambaGqaCase, double>("zamba-gqa"); }
TEST_CASE("zamba_cases: zamba-gqa in float") { passes<ZambaGqaCase, float>("zamba-gqa"); }
TEST_CASE("zamba_cases: zamba in float") { passes<ZambaCase, float>("zamba"); }
TEST_CASE("zamba_cases: zamba in bfloat16") { passes<ZambaCase, bf16>("zamba"); }
