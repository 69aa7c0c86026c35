// SPDX-License-Identifier: MIT
// AnyModel of a model on CUDA gives what the Model itself gives, and generates as it does: where the device draws.
#include <zamba/zamba.cuh>

#include <thread>

#include <doctest/doctest.h>

#include "support/nets.hpp"

// Instantiated in model.cu.
extern template class zamba::Model<zamba_test::Hybrid, zamba::bf16, zamba::cuda>;

namespace {

using namespace zamba_test;

using Prompts = std::vector<std::vector<Token>>;

AnyModel any_model() { return AnyModel(random_model<Hybrid, bf16, cuda>(), "hybrid"); }

}  // namespace

TEST_CASE("any_model on CUDA: prompt, chunk and token give the model's own logits, which the host reads") {
  const auto model = random_model<Hybrid, bf16, cuda>();
  const AnyModel any = any_model();
  CHECK(any.facts().device == "cuda");
  CHECK(any.facts().workspace_bytes(2, 20) == static_cast<Index>(decltype(model)::workspace_bytes({2, 20})));
  auto state = model.new_state({.batch = 2, .max_length = 20});
  AnyState any_state = any.new_state({.batch = 2, .max_length = 20});
  const std::vector<Token> prompt = random_tokens(7), next{3, 4};
  const std::vector<Index> lengths{5, 2}, one_each{1, 1};
  CHECK(values(any.extend(any_state, {prompt, lengths}, Positions::all)) ==
        values<cuda>(model.extend(state, {prompt, lengths}, Positions::all)));
  for (int i = 0; i < 3; ++i)
    CHECK(values(any.extend(any_state, {next, one_each})) == values<cuda>(model.extend(state, {next, one_each})));
  CHECK(any_state.lengths()[0] == 8);
  CHECK(any_state.to_bytes() == state.to_bytes());
  AnyState read = any.state_from_bytes(any_state.to_bytes());
  CHECK(values(any.extend(read, {next, one_each})) == values(any.extend(any_state, {next, one_each})));
}

TEST_CASE("any_model on CUDA: the device draws the tokens") {
  const auto model = random_model<Hybrid, bf16, cuda>();
  const AnyModel any = any_model();
  CHECK(any.draws());
  const Prompts prompts{{3, 1, 4}, {7}, {2, 8, 18, 28}};
  for (const double temperature : {0.0, 1.0}) {
    const GenerationOptions options{.sampling = {.temperature = temperature}, .max_new_tokens = 12, .seed = {11}};
    auto state = model.new_state({.batch = 3, .max_length = 64});
    AnyState any_state = any.new_state({.batch = 3, .max_length = 64});
    const Prompts wanted = generate(model, state, prompts, options);
    CHECK(generate(any, any_state, prompts, options) == wanted);
    AnyState again = any.new_state({.batch = 3, .max_length = 64});
    Prompts seen(3);
    generate(any, again, prompts, options, [&](Index row, Token token) {
      seen[static_cast<std::size_t>(row)].push_back(token);
      return true;
    });
    CHECK(seen == wanted);
  }
  // With a context of its own: a graph of steps that draw, and one more where the host asks for logits.
  std::thread([&] {
    AnyState state = any.new_state({.max_length = 64});
    generate(any, state, std::vector<Token>{1, 2}, {.max_new_tokens = 8});
    CHECK(this_thread_context<cuda>().recorded() == 1);
    for (Token token = 0; token < 3; ++token) any.extend(state, {token});
    CHECK(this_thread_context<cuda>().recorded() == 2);
  }).join();
}

TEST_CASE("any_model on CUDA: losses, perplexity and multiple choice, as far as the device has them") {
  const auto model = random_model<Hybrid, bf16, cuda>();
  const AnyModel any = any_model();
  const std::vector<Token> text = random_tokens(300);
  const WindowOptions windows{.length = 64, .stride = 16};
  const LossSum loss = text_loss(any, text, windows);
  CHECK(loss.count == 299);
  if constexpr (!trains<cuda>) {
    CHECK_FALSE(any.trains());
    CHECK(loss.sum == text_loss(model, text, windows).sum);
    const std::vector<Index> offsets{0, 300};
    CHECK_THROWS_WITH_AS(any.loss({text, text, offsets}),
                         "zamba: AnyModel: loss: not every operator has a backward pass on cuda, so models do not "
                         "train there",
                         Error);
  }
  // Activations are rounded to 2^-9 some forty times on the way to a logit.
  const double exact = text_loss(random_model<Hybrid, bf16>().to<double>(), text, windows).sum;
  CHECK(std::abs(loss.sum - exact) <= 40 * 0x1p-9 * exact);

  const std::vector<MultipleChoiceItem> items{
      {.name = "one", .context = "ab", .choices = {{"c"}, {"dd"}}},
      {.name = "two", .context = "b", .choices = {{"aa"}, {"d"}, {"e"}}, .answer = 1}};
  const auto encode = [](std::string_view part) {
    std::vector<Token> tokens;
    for (const char letter : part) tokens.push_back(letter == ' ' ? 0 : static_cast<Token>(letter - 'a' + 1));
    return tokens;
  };
  const auto by_any = multiple_choice(any, encode, items, {}, 0, {}),
             by_model = multiple_choice(model, encode, items, {}, 0, {});
  for (std::size_t i = 0; i < items.size(); ++i)
    for (std::size_t c = 0; c < items[i].choices.size(); ++c)
      CHECK(by_any[i].choices[c].log_likelihood == by_model[i].choices[c].log_likelihood);
}
