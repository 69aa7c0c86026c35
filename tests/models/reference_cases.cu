// SPDX-License-Identifier: MIT
// The reference cases on CUDA, all that the device computes: in float at the bounds of the CPU, and in
// bfloat16.
//
// In bfloat16 an error may be one and a half times that of PyTorch's own run in bfloat16, for the logits, for the worst
// hidden state and for the worst cache of the case. Both round weights and activations to 8 bits, in places that differ
// here and there; each constant below is what tests/interop/torch_bf16.py prints (PyTorch 2.11, transformers 5.17, on
// an H100, without kernels of other packages).
#include <zamba/zamba.cuh>

#include <zamba/testing/check_reference.hpp>

#include <set>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>

using namespace zamba_test;
using zamba::testing::check_reference;

namespace {

using zamba::testing::reference_bounds;
using zamba::testing::ReferenceBounds;

template <class Net, class T>
void passes(const std::string& name, std::size_t lines, const ReferenceBounds& bounds) {
  CAPTURE(name);
  const auto report = check_reference<Net, T, cuda>(case_path(name), bounds);
  MESSAGE(report);
  CHECK(report.passed());
  CHECK(report.lines().size() == lines + 6);
}

/// logits, hidden_states, caches: the relative errors of PyTorch.
template <class Net>
void passes_in_both(const std::string& name, std::size_t lines, double logits, double hidden_states, double caches) {
  passes<Net, float>(name, lines, reference_bounds<float>());
  ReferenceBounds bounds = reference_bounds<bf16>();
  bounds.logits = 1.5 * logits;
  bounds.hidden_states = 1.5 * hidden_states;
  bounds.caches = 1.5 * caches;
  passes<Net, bf16>(name, lines, bounds);
}

}  // namespace

// Lines: logits and two kinds of caches for each of two ways of extending, four kinds where there is attention beside a
// recurrence; logits and hidden states at once, and the greedy continuation. Training adds six: loss and gradients in
// two ways, the losses of its steps and the parameters after them.
TEST_CASE("reference_cases on CUDA: llama") { passes_in_both<LlamaCase>("llama", 9, 0.01077, 0.01122, 0.01025); }
TEST_CASE("reference_cases on CUDA: mamba") { passes_in_both<MambaCase>("mamba", 9, 0.00630, 0.00640, 0.01554); }
TEST_CASE("reference_cases on CUDA: mamba2") { passes_in_both<Mamba2Case>("mamba2", 9, 0.01405, 0.01402, 0.02294); }
TEST_CASE("reference_cases on CUDA: mamba2-groups") {
  passes_in_both<Mamba2GroupsCase>("mamba2-groups", 9, 0.01344, 0.01296, 0.02597);
}
TEST_CASE("reference_cases on CUDA: zamba") { passes_in_both<ZambaCase>("zamba", 13, 0.01299, 0.01369, 0.03219); }
TEST_CASE("reference_cases on CUDA: zamba-gqa") {
  passes_in_both<ZambaGqaCase>("zamba-gqa", 13, 0.01135, 0.01298, 0.02306);
}
TEST_CASE("reference_cases on CUDA: zamba2") { passes_in_both<Zamba2Case>("zamba2", 13, 0.02693, 0.02783, 0.04708); }
TEST_CASE("reference_cases on CUDA: zamba2-two-blocks") {
  passes_in_both<Zamba2TwoBlocksCase>("zamba2-two-blocks", 13, 0.07904, 0.08181, 0.14757);
}

TEST_CASE("reference_cases on CUDA: zamba in double, and what one wrong number fails") {
  const CaseCopy copy("zamba");
  const auto report = check_reference<ZambaCase, double, cuda>(copy.path());
  INFO(report);
  CHECK(report.passed());
  CHECK(report.lines().size() == 13 + 6);

  copy.edit("reference.safetensors", [](HeldTensors& tensors) {
    for (const char* name : {"cache.ssm.7", "grad.model.layers.0.mamba.in_proj.weight"})
      tensors[name].element<float>(40) += 1;
  });
  std::set<std::string> failed;
  for (const auto& line : check_reference<ZambaCase, double, cuda>(copy.path()).lines())
    if (!line.passed()) failed.insert(line.name);
  CHECK(failed ==
        std::set<std::string>{"cache.ssm, extend", "cache.ssm, extend in chunks", "grad", "grad, recomputed"});
}
