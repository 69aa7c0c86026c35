// SPDX-License-Identifier: MIT
// The reference cases of model_type zamba2, complete: in double, in float, and with weights stored as bfloat16.
// What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>.
#include <tests/support/reference_passes.hpp>

using namespace zamba_test;

TEST_CASE("zamba2_cases: zamba2 in double") { passes<Zamba2Case, double>("zamba2", 19); }
TEST_CASE("zamba2_cases: zamba2 in float") { passes<Zamba2Case, float>("zamba2", 19); }
TEST_CASE("zamba2_cases: zamba2 in bfloat16") { passes<Zamba2Case, bf16>("zamba2", 19); }
TEST_CASE("zamba2_cases: zamba2-two-blocks in double") { passes<Zamba2TwoBlocksCase, double>("zamba2-two-blocks", 19); }
TEST_CASE("zamba2_cases: zamba2-two-blocks in float") { passes<Zamba2TwoBlocksCase, float>("zamba2-two-blocks", 19); }
