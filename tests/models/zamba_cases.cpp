// SPDX-License-Identifier: MIT
// The reference cases of model_type zamba, complete: in double, in float, and with weights stored as bfloat16.
// What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>; the case zamba in
// double is in tests/testing/check_reference.cpp.
#include <tests/support/reference_passes.hpp>

using namespace zamba_test;

TEST_CASE("zamba_cases: zamba-gqa in double") { passes<ZambaGqaCase, double>("zamba-gqa", 19); }
TEST_CASE("zamba_cases: zamba-gqa in float") { passes<ZambaGqaCase, float>("zamba-gqa", 19); }
TEST_CASE("zamba_cases: zamba in float") { passes<ZambaCase, float>("zamba", 19); }
TEST_CASE("zamba_cases: zamba in bfloat16") { passes<ZambaCase, bf16>("zamba", 19); }
