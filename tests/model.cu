// SPDX-License-Identifier: MIT
// Whole models on CUDA: what extend() promises, as on the CPU. Agreement with it is in cuda/models.cu.
#include <zamba/zamba.cuh>

#include <doctest/doctest.h>

#include "cuda/split_model.hpp"
#include "support/extend_properties.hpp"

// Every member is instantiated, for cuda/split_model.cpp.
template class zamba::Model<zamba_test::Hybrid, zamba::bf16, zamba::cuda>;

using namespace zamba_test;

std::vector<double> zamba_test::split_logits_by_nvcc() { return split_logits(random_model<Hybrid, bf16, cuda>()); }

TEST_CASE("extend() on CUDA: float") { check_extend<Hybrid, float, cuda>(); }
TEST_CASE("extend() on CUDA: double") { check_extend<TwoCopies, double, cuda>(); }
TEST_CASE("extend() on CUDA: nested stacks") { check_extend<Nested, float, cuda>(); }
// This net magnifies roundings: after 1021 tokens of six random prompts the CPU's logits in float are off by 0.7e-5 to
// 5.6e-5, and any two ways to compute them by up to twice that.
TEST_CASE("extend() on CUDA: Zamba2") { check_extend<Second, float, cuda>(1.2e-4); }
TEST_CASE("extend() on CUDA: Mamba layers only") { check_extend<Plain, float, cuda>(); }
// This one even more: the CPU's logits in float are off by up to 8e-4, 13,000 roundings of 6e-8. As many of 1.1e-16 are
// 1.5e-12.
TEST_CASE("extend() on CUDA: stacks of stacks, with rope and adapters") {
  check_extend<NestedAdapted, double, cuda>(1.5e-12);
}
TEST_CASE("extend() on CUDA: bfloat16") { check_extend<Hybrid, bf16, cuda>(); }

TEST_CASE("a head of its own, on CUDA") { check_own_head<double, cuda>(); }
TEST_CASE("each use meets its own adapters, on CUDA") { check_adapters<float, cuda>(); }
