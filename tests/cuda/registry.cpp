// SPDX-License-Identifier: MIT
// A Registry holds a model on two devices, in a .cpp: ../model.cu instantiates the one on CUDA.
#include <zamba/checkpoints/registry.hpp>
#include <zamba/checkpoints/zamba.hpp>

#include <doctest/doctest.h>

#include <zamba/eval/perplexity.hpp>
#include <zamba/generate/generator.hpp>

#include "../support/nets.hpp"
#include "../support/temporary_folder.hpp"

extern template class zamba::Model<zamba_test::Hybrid, zamba::bf16, zamba::cuda>;

namespace {

using namespace zamba_test;

TEST_CASE("registry: a folder becomes a model on the device that is wanted") {
  Registry registry;
  registry.add<Hybrid, bf16>("hybrid").add<Hybrid, bf16, cuda>("hybrid");
  CHECK_THROWS_AS((registry.add<Hybrid, bf16, cuda>("hybrid")), Error);
  const TemporaryFolder folder;
  save_huggingface(random_model<Hybrid, bf16>(), folder.path);
  CHECK(registry.match(folder.path).device == "cpu");  // the first added
  CHECK(detail::model_text(registry.match(folder.path, {}, "cuda")) == "hybrid in BF16 on cuda (model_type zamba)");

  const AnyModel here = registry.load(folder.path), there = registry.load(folder.path, {}, {}, "cuda");
  CHECK(here.facts().device == "cpu");
  CHECK(there.facts().device == "cuda");
  CHECK(there.checkpoint_config() == here.checkpoint_config());
  const auto model = random_model<Hybrid, bf16, cuda>();
  auto state = model.new_state({.max_length = 40});
  AnyState any_state = there.new_state({.max_length = 40});
  const GenerationOptions options{.max_new_tokens = 20, .seed = {3}};
  const std::vector<Token> prompt{5, 6, 7};
  CHECK(generate(there, any_state, prompt, options) == generate(model, state, prompt, options));

  // Activations are rounded to 2^-9 some forty times on the way to a logit.
  const std::vector<Token> text = random_tokens(200);
  const double exact = text_loss(here, text, {.length = 50}).sum;
  CHECK(std::abs(text_loss(there, text, {.length = 50}).sum - exact) <= 40 * 0x1p-9 * exact);
}

}  // namespace
