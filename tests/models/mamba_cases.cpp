// SPDX-License-Identifier: MIT
// The reference cases of model_type mamba and mamba2, complete: in double, in float, and with weights stored as
// bfloat16. What is compared, and the bounds with their reasons, are in <zamba/testing/check_reference.hpp>.
#include <tests/support/reference_passes.hpp>

using namespace zamba_test;

TEST_CASE("mamba_cases: mamba in double") { passes<MambaCase, double>("mamba", 15); }
TEST_CASE("mamba_cases: mamba in float") { passes<MambaCase, float>("mamba", 15); }
TEST_CASE("mamba_cases: mamba2 in double") { passes<Mamba2Case, double>("mamba2", 15); }
TEST_CASE("mamba_cases: mamba2 in float") { passes<Mamba2Case, float>("mamba2", 15); }
TEST_CASE("mamba_cases: mamba2 in bfloat16") { passes<Mamba2Case, bf16>("mamba2", 15); }
TEST_CASE("mamba_cases: mamba2-groups in double") { passes<Mamba2GroupsCase, double>("mamba2-groups", 15); }
TEST_CASE("mamba_cases: mamba2-groups in float") { passes<Mamba2GroupsCase, float>("mamba2-groups", 15); }
TEST_CASE("mamba_cases: mamba2-groups in bfloat16") { passes<Mamba2GroupsCase, bf16>("mamba2-groups", 15); }
