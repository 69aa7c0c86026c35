// SPDX-License-Identifier: MIT
// AnyModel gives, for every type behind it, what the Model itself gives.
#include <zamba/any_model.hpp>

#include <cstring>

#include <doctest/doctest.h>

#include <zamba/generate/generator.hpp>

#include "support/allocation_count.hpp"
#include "support/cases.hpp"
#include "support/nets.hpp"

namespace {

using namespace zamba_test;

using Prompts = std::vector<std::vector<Token>>;

template <class A>
bool equal(Matrix<const float> got, Matrix<const A> wanted) {
  if (got.rows() != wanted.rows() || got.cols() != wanted.cols()) return false;
  for (Index i = 0; i < wanted.size(); ++i)
    if (got.data[i] != static_cast<float>(wanted.data[i])) return false;
  return true;
}

template <class T>
AnyModel any_model() {
  return AnyModel(random_model<Hybrid, T>(), "hybrid", "test");
}

TEST_CASE_TEMPLATE("any_model: prompt, chunk and token give the model's own logits", T, float, bf16, double) {
  const auto model = random_model<Hybrid, T>();
  const AnyModel any = any_model<T>();
  auto state = model.new_state({.batch = 2, .max_length = 20});
  AnyState any_state = any.new_state({.batch = 2, .max_length = 20});
  const std::vector<Token> prompt = random_tokens(7);
  const std::vector<Index> lengths{5, 2}, one_each{1, 1};
  const std::vector<Token> next{3, 4};
  CHECK(equal(any.extend(any_state, {prompt, lengths}, Positions::all),
              model.extend(state, {prompt, lengths}, Positions::all)));
  for (int i = 0; i < 3; ++i)
    CHECK(equal(any.extend(any_state, {next, one_each}), model.extend(state, {next, one_each})));
  CHECK(any_state.length(0) == 8);
  CHECK(any_state.length(1) == 5);
  CHECK(any_state.to_bytes() == state.to_bytes());

  const std::vector<Index> offsets{0, 4, 7};
  const TrainingBatch batch{prompt, prompt, offsets};
  CHECK(any.loss(batch).sum == model.loss(batch).sum);
  CHECK(any.loss(batch, &any_state).sum == model.loss(batch, &state).sum);
  CHECK(any_state.length(0) == 12);
}

TEST_CASE_TEMPLATE("any_model: generate takes it like a model", T, float, bf16, double) {
  const auto model = random_model<Hybrid, T>();
  const AnyModel any = any_model<T>();
  const Prompts prompts{{3, 1, 4}, {7}, {2, 8, 18, 28}};
  for (const double temperature : {0.0, 1.0}) {
    const GenerationOptions options{.sampling = {.temperature = temperature}, .max_new_tokens = 12, .seed = {11}};
    auto state = model.new_state({.batch = 3, .max_length = 64});
    AnyState any_state = any.new_state({.batch = 3, .max_length = 64});
    const Prompts wanted = generate(model, state, prompts, options);
    const Prompts got = generate(any, any_state, prompts, options);
    if (!std::is_same_v<T, double> || temperature == 0) CHECK(got == wanted);  // a draw sees its logits as floats
    AnyState alone = any.new_state({.max_length = 64});
    std::vector<Token> seen;
    CHECK(generate(any, alone, prompts[0], options, [&](Index row, Token token) {
            seen.push_back(token);
            return row == 0;
          }) == got[0]);
    CHECK(seen == got[0]);
  }
}

}  // namespace

TEST_CASE("any_model: states are values") {
  const AnyModel any = any_model<float>();
  AnyState state = any.new_state({.batch = 2, .max_length = 12});
  const std::vector<Token> prompt = random_tokens(6), more{1, 2};
  const std::vector<Index> lengths{4, 2}, one_each{1, 1};
  any.extend(state, {prompt, lengths});

  AnyState copy = state;
  const auto snapshot = state.snapshot();
  const auto wanted = values(any.extend(state, {more, one_each}));
  CHECK(values(any.extend(copy, {more, one_each})) == wanted);
  state.roll_back(snapshot);
  CHECK(state.length(0) == 4);
  CHECK(values(any.extend(state, {more, one_each})) == wanted);
  copy = state;
  CHECK(copy.to_bytes() == state.to_bytes());
  AnyState read = any.state_from_bytes(state.to_bytes());
  CHECK(read.to_bytes() == state.to_bytes());
  CHECK(read.bytes() == state.bytes());

  const std::vector<Index> rows{1, 0, 1};
  AnyState gathered = state.gather(rows);
  CHECK(gathered.batch() == 3);
  CHECK(gathered.max_length() == 12);
  CHECK(std::vector<Index>(gathered.lengths().begin(), gathered.lengths().end()) == std::vector<Index>{3, 5, 3});
  state.reset(0);
  CHECK(state.length(0) == 0);
  CHECK(state.length(1) == 3);
  state.reset();
  CHECK(state.length(1) == 0);
  CHECK(copy.length(0) == 5);
}

TEST_CASE("any_model: a state of another model is refused, and the model's own errors come through") {
  const AnyModel any = any_model<float>(), other = any_model<bf16>();
  AnyState state = other.new_state();
  CHECK(contains(message_of([&] { any.extend(state, {1}); }), "the state belongs to a model of another type"));
  CHECK(state.length() == 0);
  const std::vector<Index> offsets{0, 1};
  const std::vector<Token> token{1};
  CHECK(contains(message_of([&] { any.loss({token, token, offsets}, &state); }), "a model of another type"));
  CHECK(contains(message_of([&] { other.extend(state, {Token{vocabulary}}); }), "outside the vocabulary"));
  CHECK(contains(message_of([&] { any.state_from_bytes(state.to_bytes()); }), "State::from_bytes"));
}

TEST_CASE("any_model: facts are the constants of the type") {
  const AnyModel any = any_model<bf16>();
  const ModelFacts& facts = any.facts();
  CHECK(facts.name == "hybrid");
  CHECK(facts.model_type == "test");
  CHECK(facts.storage == DType::BF16);
  CHECK(any.vocabulary() == vocabulary);
  CHECK(facts.d_model == 16);
  CHECK(facts.layers == 4);
  CHECK(facts.parameters == parameter_count<Hybrid>);
  CHECK(facts.active_parameters == active_parameter_count<Hybrid>);
  CHECK(facts.flops_per_token == flops_per_token<Hybrid>);
  CHECK(facts.state_bytes(3, 100) == state_bytes<Hybrid, bf16>(3, 100));
  Index bytes = 0;
  const auto model = random_model<Hybrid, bf16>();
  for (const ParameterEntry& entry : model.entries()) bytes += static_cast<Index>(model.bytes(entry));
  CHECK(facts.weight_bytes == bytes);
}

TEST_CASE_TEMPLATE("any_model: decoding allocates nothing after the first token", T, float, double) {
  const AnyModel any = any_model<T>();
  AnyState state = any.new_state({.max_length = 40});
  any.extend(state, {1, 2, 3});
  any.extend(state, {4});
  const long before = allocations.load();
  for (Token token = 0; token < 20; ++token) any.extend(state, {token});
  CHECK(allocations.load() == before);
}
