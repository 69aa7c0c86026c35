// SPDX-License-Identifier: MIT
// The reference case of model_type llama, complete: in double, in float, and with weights stored as bfloat16.
// What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>.
#include <tests/support/reference_passes.hpp>

using namespace zamba_test;

TEST_CASE("llama_cases: llama in double") { passes<LlamaCase, double>("llama", 15); }
TEST_CASE("llama_cases: llama in float") { passes<LlamaCase, float>("llama", 15); }
TEST_CASE("llama_cases: llama in bfloat16") { passes<LlamaCase, bf16>("llama", 15); }
