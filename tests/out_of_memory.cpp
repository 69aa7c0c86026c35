// SPDX-License-Identifier: MIT
// Whatever allocation fails, the call that wanted it throws an OutOfMemory, and states, weights and moments are as they
// were. Allocations fail from the n-th on, for every n until a call passes; generate/decode_allocations.cpp has
// replaced malloc in this program.
#include <zamba/error.hpp>

#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/any_model.hpp>
#include <zamba/eval/log_likelihood.hpp>
#include <zamba/eval/perplexity.hpp>
#include <zamba/generate/generator.hpp>
#include <zamba/generate/speculative.hpp>
#include <zamba/train/adamw.hpp>

#include "support/allocation_count.hpp"
#include "support/nets.hpp"

namespace {

using namespace zamba_test;
using Bytes = std::vector<std::byte>;

/// A mixer that does not say what it computes with, so that nobody knows its workspace before.
struct Opaque : Mixer {
  static constexpr bool by_operators = false;
};
using OpaqueHybrid = LanguageModel<vocabulary, HybridStack<4, 2, Opaque, Shared>>;

/// What a call works on, made anew for each trial: its context holds no memory yet.
template <class Net, class T>
struct Trial {
  using M = Model<Net, T>;

  const M& model;
  Context<cpu> ctx;
  typename M::StateType state;

  Trial(const M& model, int threads, Index rows, Index past)
      : model(model), ctx(threads), state(model.new_state({.batch = rows, .max_length = 160})) {
    if (past == 0) return;
    Context<cpu> other(threads);
    model.extend(other, state, {random_tokens(rows * past), std::vector<Index>(static_cast<std::size_t>(rows), past)});
  }
};

/// Calls call(trial) with memory for n allocations, n = 0, 1, ...; what it throws is an OutOfMemory, and same(trial)
/// does not change. Returns how often memory did not suffice.
template <class Make, class Call, class Same>
int failures(Make&& make, Call&& call, Same&& same) {
  for (int n = 0; n < 2000; ++n) {
    auto trial = make();
    const auto before = same(trial);
    std::string message;
    bool passed = false;
    try {
      const AllocationLimit limit(n);
      call(trial);
      passed = true;
    } catch (const OutOfMemory& error) {
      message = error.what();
    }
    if (passed) return n;
    CAPTURE(n);
    REQUIRE(message.find("out of memory") != std::string::npos);
    REQUIRE(same(trial) == before);
    // With memory it goes on as if nothing had been.
    auto untouched = make();
    call(trial);
    call(untouched);
    REQUIRE(same(trial) == same(untouched));
  }
  return -1;
}

/// Every way in which a state is continued.
template <class Net, class T>
void check_inference(int threads) {
  const auto model = random_model<Net, T>();
  CAPTURE(threads);
  const auto bytes = [](auto& trial) { return trial.state.to_bytes(); };
  const auto trial = [&](Index rows, Index past) {
    return [&, rows, past] { return Trial(model, threads, rows, past); };
  };
  {  // the OpenMP runtime takes its memory once, and ends the program where it gets none
    auto first = trial(4, 3)();
    model.extend(first.ctx, first.state, {random_tokens(8), std::vector<Index>{2, 2, 2, 2}});
  }
  const std::vector<Token> tokens = random_tokens(120, 3), few = random_tokens(5, 4);
  const std::vector<Index> ragged{50, 0, 63, 7}, last{2, 1, 0, 2}, one_each(4, 1);
  const auto extend = [&](const std::vector<Token>& t, const std::vector<Index>& lengths, Positions positions) {
    return [&, positions](auto& at) { at.model.extend(at.ctx, at.state, {t, lengths}, positions); };
  };
  CHECK(failures(trial(4, 0), extend(tokens, ragged, Positions::last), bytes) > 0);  // a prompt
  CHECK(failures(trial(4, 40), extend(tokens, ragged, Positions::all), bytes) > 0);  // a chunk
  CHECK(failures(trial(4, 40), extend(few, last, Positions::last), bytes) > 0);
  const std::vector<Token> next = random_tokens(4, 5);
  CHECK(failures(trial(4, 40), extend(next, one_each, Positions::last), bytes) > 0);  // a token
  const std::vector<std::vector<Token>> prompts{random_tokens(40), {1}, {2, 3}, random_tokens(9)};
  CHECK(failures(
            trial(4, 5),
            [&](auto& at) {
              generate(at.ctx, at.model, at.state, std::span(prompts), {.max_new_tokens = 6, .seed = {1}},
                       [](Index row, Token) { return row != 1; });
            },
            bytes) > 0);
}

template <class Net, class T>
void check_training(int threads) {
  CAPTURE(threads);
  const auto model = random_model<Net, T>();
  const auto make = [&] { return Trial(model, threads, 2, 20); };
  const auto bytes = [](auto& trial) { return trial.state.to_bytes(); };
  const std::vector<Token> tokens = random_tokens(110, 7);
  const std::vector<Index> offsets{0, 70, 110};
  const TrainingBatch batch{tokens, tokens, offsets};
  auto gradients = model.new_gradients();
  {
    auto first = make();
    model.loss_and_gradients(first.ctx, batch, gradients, {.state = &first.state});
  }
  CHECK(failures(
            make, [&](auto& at) { model.loss(at.ctx, batch, &at.state); }, bytes) > 0);
  for (const bool recompute : {false, true})
    CHECK(failures(
              make,
              [&](auto& at) {
                model.loss_and_gradients(at.ctx, batch, gradients, {.recompute = recompute, .state = &at.state});
              },
              bytes) > 0);

  struct Step {
    Model<Net, T> model = random_model<Net, T>();
    Context<cpu> ctx;
    AdamW<Net, T, cpu> optimiser{model};
  };
  CHECK(failures([&] { return Step{.ctx = Context<cpu>(threads)}; },
                 [&](auto& at) { at.optimiser.step(at.ctx, at.model, gradients, 1e-3); },
                 [](auto& at) {
                   std::vector<double> all{static_cast<double>(at.optimiser.steps())};
                   for (const ParameterEntry& entry : at.model.entries()) append(all, at.model.read(entry));
                   const auto moments = at.optimiser.first_moments();
                   all.insert(all.end(), moments.data, moments.data + moments.size());
                   return all;
                 }) > 0);
}

TEST_SUITE("out_of_memory") {
  TEST_CASE("whatever allocation fails, the state is as it was: inference") {
    for (const int threads : {1, 2}) {
      check_inference<Hybrid, float>(threads);
      check_inference<Second, bf16>(threads);
      check_inference<NestedTransformer, double>(threads);
      check_inference<OpaqueHybrid, float>(threads);
    }
  }
  TEST_CASE("whatever allocation fails, states, weights and moments are as they were: training") {
    for (const int threads : {1, 2}) {
      check_training<Hybrid, float>(threads);
      check_training<Second, bf16>(threads);
      check_training<OpaqueHybrid, float>(threads);
    }
  }

  TEST_CASE("want of memory for training is told part by part, before anything is computed") {
    const auto model = random_model<Hybrid, bf16>();
    auto gradients = model.new_gradients();
    const std::vector<Token> tokens = random_tokens(120, 7);
    const std::vector<Index> offsets{0, 60, 120};
    const TrainingBytes bytes = decltype(model)::training_bytes({2, 60}, 1);
    const auto part = [](const char* name, std::size_t size) { return name + std::to_string(size); };
    const std::string wanted = part("", bytes.total()) + part(" bytes in all, weights ", bytes.weights) +
                               part(" + gradients ", bytes.gradients) + part(" + moments ", bytes.moments) +
                               part(" + activations ", bytes.activations) + part(" + workspace ", bytes.workspace);
    bool told = false;
    for (int n = 0; n < 4; ++n) {
      Context<cpu> ctx(1);
      try {
        const AllocationLimit limit(n);
        model.loss_and_gradients(ctx, {tokens, tokens, offsets}, gradients, {});
      } catch (const OutOfMemory& error) {
        told = told || std::string(error.what()).find(wanted) != std::string::npos;
      }
    }
    CHECK(told);
    for (const float value : std::span(gradients.values().data, static_cast<std::size_t>(gradients.values().size())))
      REQUIRE(value == 0);
    Context<cpu> ctx(1);
    CHECK_NOTHROW(model.loss_and_gradients(ctx, {tokens, tokens, offsets}, gradients, {}));
  }

  TEST_CASE("states are copied, gathered, read and written all or not at all") {
    const auto model = random_model<Hybrid, float>();
    const auto make = [&] { return Trial(model, 1, 3, 9); };
    const auto bytes = [](auto& trial) { return trial.state.to_bytes(); };
    const Bytes written = make().state.to_bytes();
    const std::vector<Index> rows{2, 0, 2, 1};
    CHECK(failures(
              make, [&](auto& at) { auto copy = at.state; }, bytes) > 0);
    CHECK(failures(
              make, [&](auto& at) { at.state.gather(rows); }, bytes) > 0);
    CHECK(failures(
              make, [&](auto& at) { at.state.snapshot(); }, bytes) > 0);
    CHECK(failures(
              make, [&](auto& at) { at.state.to_bytes(); }, bytes) > 0);
    CHECK(failures(
              make, [&](auto& at) { at.state = model.state_from_bytes(written); }, bytes) > 0);
    CHECK(failures(
              make, [&](auto&) { model.new_state({.batch = 3, .max_length = 9}); }, bytes) > 0);
  }

  TEST_CASE("weights are read and written, texts judged and continued with a draft, or not at all") {
    auto model = random_model<Hybrid, float>();
    const auto draft = random_model<Second, float>();
    const std::vector<Token> tokens = random_tokens(12, 2), targets = random_tokens(12, 3), prompt{3, 1, 4};
    const std::vector<Index> lengths{5, 7};
    struct Pair {
      State<Hybrid, float, cpu> state;
      State<Second, float, cpu> drafted;
    };
    const auto make = [&] {
      return Pair{model.new_state({.batch = 2, .max_length = 24}), draft.new_state({.batch = 1, .max_length = 24})};
    };
    const auto single = [&] { return Pair{model.new_state({.max_length = 24}), make().drafted}; };
    const auto bytes = [](Pair& pair) {
      Bytes all = pair.state.to_bytes();
      const Bytes drafted = pair.drafted.to_bytes();
      all.insert(all.end(), drafted.begin(), drafted.end());
      return all;
    };
    const ParameterEntry& entry = model.entries()[2];
    const auto values = model.read(entry);
    CHECK(failures(
              make, [&](Pair&) { model.read(entry); }, bytes) > 0);
    CHECK(failures(
              make, [&](Pair&) { model.write(entry, values); }, bytes) > 0);
    CHECK(failures(
              make,
              [&](Pair& pair) {
                log_likelihoods(model, pair.state, {tokens, lengths}, targets);
              },
              bytes) > 0);
    CHECK(failures(
              make, [&](Pair&) { text_loss(model, tokens, {.length = 6}); }, bytes) > 0);
    CHECK(failures(
              single,
              [&](Pair& pair) {
                generate_speculatively(model, pair.state, draft, pair.drafted, prompt, {.max_new_tokens = 5});
              },
              bytes) > 0);
  }

  TEST_CASE("AnyModel: the same, with logits of its own") {
    const AnyModel model(random_model<Hybrid, double>(), "hybrid");
    const auto make = [&] {
      AnyState state = model.new_state({.batch = 2, .max_length = 40});
      model.extend(state, {random_tokens(6), std::vector<Index>{4, 2}});
      return state;
    };
    const auto bytes = [](AnyState& state) { return state.to_bytes(); };
    const std::vector<Token> tokens = random_tokens(40, 3);
    const std::vector<Index> lengths{34, 6}, rows{1, 1, 0};
    const auto written = make().to_bytes();
    CHECK(failures(
              make,
              [&](AnyState& s) {
                model.extend(s, {tokens, lengths}, Positions::all);
              },
              bytes) > 0);
    CHECK(failures(
              make, [&](AnyState& s) { AnyState copy = s; }, bytes) > 0);
    CHECK(failures(
              make, [&](AnyState& s) { s.gather(rows); }, bytes) > 0);
    CHECK(failures(
              make, [&](AnyState& s) { s = model.state_from_bytes(written); }, bytes) > 0);
    const std::vector<std::vector<Token>> prompts{{1, 2}, {3}};
    CHECK(failures(
              make, [&](AnyState& s) { generate(model, s, prompts, {.max_new_tokens = 4, .seed = {1}}); }, bytes) > 0);
  }

  TEST_CASE("the workspace is all that extend takes: with it, nothing fails") {
    for (const int threads : {1, 2}) {
      const auto model = random_model<Second, bf16>();
      Trial trial(model, threads, 4, 0);
      const std::vector<Token> tokens = random_tokens(120, 3);
      const std::vector<Index> ragged{50, 0, 63, 7};
      model.extend(trial.ctx, trial.state, {tokens, ragged});
      const long before = allocations.load();
      model.extend(trial.ctx, trial.state, {tokens, ragged});
      CHECK(allocations.load() == before);
    }
  }
}

}  // namespace
