// SPDX-License-Identifier: MIT
// The reference cases of model_type mamba and mamba2, complete: in double, in float, and with weights stored as
// bfloat16. What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>.
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
  CHECK(report.lines().size() == 15);  // no keys and values
}

}  // namespace

TEST_CASE("mamba_cases: mamba in double") { passes<MambaCase, double>("mamba"); }
TEST_CASE("mamba_cases: mamba in float") { passes<MambaCase, float>("mamba"); }
TEST_CASE("mamba_cases: mamba2 in double") { passes<Mamba2Case, double>("mamba2"); }
TEST_CASE("mamba_cases: mamba2 in float") { passes<Mamba2Case, float>("mamba2"); }
TEST_CASE("mamba_cases: mamba2 in bfloat16") { passes<Mamba2Case, bf16>("mamba2"); }
TEST_CASE("mamba_cases: mamba2-groups in double") { passes<Mamba2GroupsCase, double>("mamba2-groups"); }
TEST_CASE("mamba_cases: mamba2-groups in float") { passes<Mamba2GroupsCase, float>("mamba2-groups"); }
TEST_CASE("mamba_cases: mamba2-groups in bfloat16") { passes<Mamba2GroupsCase, bf16>("mamba2-groups"); }
