// SPDX-License-Identifier: MIT
// The reference case of model_type llama, complete: in double, in float, and with weights stored as bfloat16.
// What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>.
#include <zamba/testing/check_reference.hpp>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>

using namespace zamba_test;

namespace {

template <class T>
void passes() {
  const auto report = zamba::testing::check_reference<LlamaCase, T>(case_path("llama"));
  MESSAGE(report);
  CHECK(report.passed());
  CHECK(report.lines().size() == 15);  // no recurrent state
}

}  // namespace

TEST_CASE("llama_cases: llama in double") { passes<double>(); }
TEST_CASE("llama_cases: llama in float") { passes<float>(); }
TEST_CASE("llama_cases: llama in bfloat16") { passes<bf16>(); }
