// SPDX-License-Identifier: MIT
// Not compiled by nvcc, and without CUDA's headers: a whole model is reached through `extern template`.
#include "split_model.hpp"

#include <algorithm>
#include <type_traits>

#include <doctest/doctest.h>

#include <zamba/any_model.hpp>
#include <zamba/generate/generator.hpp>

extern template class zamba::Model<zamba_test::Hybrid, zamba::bf16, zamba::cuda>;

namespace {

using namespace zamba_test;

TEST_CASE("a .cpp runs the model that a .cu instantiates, with the same bits") {
  const auto model = random_model<Hybrid, bf16, cuda>();
  const std::vector<double> logits = split_logits(model);
  CHECK(logits == split_logits_by_nvcc());
  CHECK(std::any_of(logits.begin(), logits.end(), [](double value) { return value != 0; }));

  // Activations are rounded to 2^-9 some forty times on the way to a logit.
  const auto on_cpu = random_model<Hybrid, bf16>().to<double>();
  CHECK(relative_error(logits, split_logits(on_cpu)) <= 40 * 0x1p-9);
}

TEST_CASE("a .cpp generates with a model on CUDA, or an AnyModel of it, and knows its memory") {
  const auto model = random_model<Hybrid, bf16, cuda>();
  auto state = model.new_state({.batch = 2, .max_length = 24});
  const GenerationOptions greedy{.sampling = {.temperature = 0}, .max_new_tokens = 6};
  const std::vector<std::vector<Token>> prompts{{1, 2, 3}, {4, 5}};
  const auto rows = generate(model, state, prompts, greedy);
  CHECK(rows.size() == 2);
  CHECK(rows[0].size() == 6);
  for (const Index row : {0, 1}) CHECK(state.length(row) == static_cast<Index>(prompts[row].size()) + 5);
  CHECK(decltype(model)::workspace_bytes({2, 24}) > 0);

  const AnyModel any(random_model<Hybrid, bf16, cuda>(), "hybrid");
  AnyState any_state = any.new_state({.batch = 2, .max_length = 24});
  CHECK(generate(any, any_state, prompts, greedy) == rows);
}

}  // namespace
