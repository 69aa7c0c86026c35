// SPDX-License-Identifier: MIT
// On the CPU; generator.cu runs the same body on CUDA.
#include <zamba/generate/generator.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include <doctest/doctest.h>

#include "../support/nets.hpp"

#ifndef ZAMBA_TEST_DEVICE
#define ZAMBA_TEST_DEVICE cpu
#endif

namespace {

using namespace zamba_test;

using Device = ZAMBA_TEST_DEVICE;
using Ids = std::vector<Token>;
using Prompts = std::vector<std::vector<Token>>;

const Model<Hybrid, double, Device>& model() {
  static const auto model = random_model<Hybrid, double, Device>();
  return model;
}

const GenerationOptions greedy{.sampling = {.temperature = 0}, .max_new_tokens = 12};

/// What generate throws for rows that got no token; the callback's tokens in `seen`, where it is wanted.
template <class ModelType>
GenerationError failure(const ModelType& model, typename ModelType::StateType& state, const Prompts& prompts,
                        const GenerationOptions& options, Prompts* seen = nullptr) {
  try {
    if (seen)
      generate(model, state, prompts, options, [&](Index row, Token token) {
        (*seen)[static_cast<std::size_t>(row)].push_back(token);
        return true;
      });
    else
      generate(model, state, prompts, options);
  } catch (const GenerationError& error) {
    return error;
  }
  return {"no error", {}, {}};
}

Ids generate_alone(const Ids& prompt, const GenerationOptions& options, Index max_length = 64) {
  auto state = model().new_state({.max_length = max_length});
  return generate(model(), state, prompt, options);
}

}  // namespace

TEST_SUITE("generator") {
  TEST_CASE("greedy: each token is the largest logit of the whole sequence so far, computed without a cache") {
    const Ids prompt{3, 1, 4};
    Ids sequence = prompt;
    for (int i = 0; i < 12; ++i) {
      auto state = model().new_state({.max_length = 64});
      const std::vector<double> logits = values<Device>(model().extend(state, sequence));
      sequence.push_back(argmax(std::span(logits)));
    }
    CHECK(generate_alone(prompt, greedy) == Ids(sequence.begin() + 3, sequence.end()));
  }

  TEST_CASE("the state holds everything but the last token, with which the next prompt begins") {
    const Ids whole = generate_alone({3, 1, 4}, greedy);
    auto state = model().new_state({.max_length = 64});
    GenerationOptions five = greedy;
    five.max_new_tokens = 5;
    Ids parts = generate(model(), state, Ids{3, 1, 4}, five);
    CHECK(state.length() == 3 + 4);
    five.max_new_tokens = 7;
    const Ids more = generate(model(), state, Ids{parts.back()}, five);
    parts.insert(parts.end(), more.begin(), more.end());
    CHECK(parts == whole);
  }

  TEST_CASE("a batch of different prompts gives each row what it gets alone") {
    const Prompts prompts{{3, 1, 4}, {7}, {2, 8, 18, 28, 1, 8}, {3, 1, 4}};
    for (const double temperature : {0.0, 1.0}) {
      GenerationOptions options{.sampling = {.temperature = temperature, .top_p = 0.95, .repetition_penalty = 1.1},
                                .max_new_tokens = 15,
                                .seed = {11}};
      auto state = model().new_state({.batch = 4, .max_length = 64});
      const Prompts output = generate(model(), state, prompts, options);
      for (std::size_t row = 0; row < 4; ++row) {
        options.stream = row;
        CHECK(output[row] == generate_alone(prompts[row], options));
        CHECK(state.length(static_cast<Index>(row)) == static_cast<Index>(prompts[row].size()) + 14);
      }
      CHECK((output[0] == output[3]) == (temperature == 0));  // rows draw by themselves
      auto again = model().new_state({.batch = 4, .max_length = 64});
      options.stream = 0;
      CHECK(generate(model(), again, prompts, options) == output);
      options.seed = {12};
      auto other = model().new_state({.batch = 4, .max_length = 64});
      CHECK((generate(model(), other, prompts, options) == output) == (temperature == 0));
    }
  }

  TEST_CASE("a stop token ends its row, is returned, and leaves the others running") {
    const Prompts prompts{{3, 1, 4}, {7}};
    auto free_state = model().new_state({.batch = 2, .max_length = 64});
    const Prompts free = generate(model(), free_state, prompts, greedy);
    GenerationOptions options = greedy;
    options.stop_tokens = {free[0][4], free[0][2]};
    auto state = model().new_state({.batch = 2, .max_length = 64});
    const Prompts output = generate(model(), state, prompts, options);
    for (std::size_t row = 0; row < 2; ++row) {
      const auto& stops = options.stop_tokens;
      const auto stop = std::find_first_of(free[row].begin(), free[row].end(), stops.begin(), stops.end());
      CHECK(output[row] == Ids(free[row].begin(), stop == free[row].end() ? stop : stop + 1));
    }
    CHECK(output[0].size() <= 3);
    CHECK(state.length(0) == 3 + static_cast<Index>(output[0].size()) - 1);
  }

  TEST_CASE("the callback sees every token in order and may end a row") {
    const Prompts prompts{{3, 1, 4}, {7}};
    auto state = model().new_state({.batch = 2, .max_length = 64});
    Prompts seen(2);
    const Prompts output = generate(model(), state, prompts, greedy, [&](Index row, Token token) {
      seen[static_cast<std::size_t>(row)].push_back(token);
      return row == 1 || seen[0].size() < 4;
    });
    CHECK(seen == output);
    CHECK(output[0].size() == 4);
    CHECK(output[1].size() == 12);
    const Ids whole = generate_alone({3, 1, 4}, greedy);
    CHECK(output[0] == Ids(whole.begin(), whole.begin() + 4));
    CHECK(output[1] == generate_alone({7}, greedy));
  }

  TEST_CASE("a sequence ends at max_length, new tokens counted") {
    const Ids whole = generate_alone({3, 1, 4}, greedy);
    CHECK(generate_alone({3, 1, 4}, greedy, 8) == Ids(whole.begin(), whole.begin() + 5));
    CHECK(generate_alone({3, 1, 4}, greedy, 3).empty());
    CHECK(generate_alone({3, 1, 4}, {.max_new_tokens = 0}).empty());
    GenerationOptions endless = greedy;
    endless.max_new_tokens = std::numeric_limits<Index>::max();
    CHECK(generate_alone({3, 1, 4}, endless, 20).size() == 17);
    // In a batch the short row runs on.
    auto state = model().new_state({.batch = 2, .max_length = 8});
    const Prompts output = generate(model(), state, Prompts{{1, 2, 3, 4, 5, 6, 7, 8}, {3, 1, 4}}, greedy);
    CHECK(output[0].empty());
    CHECK(output[1] == Ids(whole.begin(), whole.begin() + 5));
  }

  TEST_CASE("a row whose logits are NaN ends and is named, and the others run to their ends") {
    const Prompts prompts{{3, 1, 4}, {7, 28}, {2, 8, 18}, {28}};
    const auto whole = random_model<Transformer, double, Device>(),
               model = nan_where_read<Transformer, double, Device>(28);
    GenerationOptions options = greedy;
    options.excluded_tokens = {28};  // so that the other rows never read it
    auto wanted_state = whole.new_state({.batch = 4, .max_length = 32});
    const Prompts wanted = generate(whole, wanted_state, prompts, options);
    for (const bool with_callback : {false, true}) {
      CAPTURE(with_callback);
      auto state = model.new_state({.batch = 4, .max_length = 32});
      Prompts seen(4);
      const GenerationError error = failure(model, state, prompts, options, with_callback ? &seen : nullptr);
      CHECK(error.rows() == std::vector<Index>{1, 3});
      CHECK(std::string(error.what()) ==
            "zamba: generate: 2 of 4 rows ended early: row 1, after 0 new tokens: argmax: the logit of token 0 is NaN; "
            "row 3, after 0 new tokens: argmax: the logit of token 0 is NaN");
      REQUIRE(error.tokens().size() == 4);
      for (const std::size_t row : {0, 2}) CHECK(error.tokens()[row] == wanted[row]);
      for (const std::size_t row : {1, 3}) CHECK(error.tokens()[row].empty());
      if (with_callback) CHECK(seen == error.tokens());
      for (const Index row : {0, 2}) CHECK(state.length(row) == wanted_state.length(row));
      CHECK(state.length(1) == 2);
    }
  }

  TEST_CASE("a row may fail after some tokens, which are not lost") {
    const auto whole = random_model<Transformer, double, Device>();
    const Prompts prompts{{3, 1, 4}, {7, 28}, {2, 8, 18}};
    auto free_state = whole.new_state({.batch = 3, .max_length = 32});
    const Prompts free = generate(whole, free_state, prompts, greedy);
    const auto at = [&](std::size_t row, Token token) {
      return std::find(free[row].begin(), free[row].end(), token) - free[row].begin();
    };
    // A token that row 0 gets, not first, and which is in no prompt.
    const auto token = std::find_if(free[0].begin() + 2, free[0].end(), [&](Token t) {
      return at(0, t) >= 2 && std::none_of(prompts.begin(), prompts.end(), [&](const Ids& prompt) {
               return std::find(prompt.begin(), prompt.end(), t) != prompt.end();
             });
    });
    REQUIRE(token != free[0].end());
    const auto model = nan_where_read<Transformer, double, Device>(*token);
    auto state = model.new_state({.batch = 3, .max_length = 32});
    const GenerationError error = failure(model, state, prompts, greedy);
    REQUIRE(error.tokens().size() == 3);
    for (std::size_t row = 0; row < 3; ++row) {
      const bool fails = at(row, *token) + 1 < 12;  // it reads the token
      const Index count = fails ? at(row, *token) + 1 : 12;
      CHECK(error.tokens()[row] == Ids(free[row].begin(), free[row].begin() + count));
      CHECK((std::find(error.rows().begin(), error.rows().end(), static_cast<Index>(row)) != error.rows().end()) ==
            fails);
    }
  }

  TEST_CASE("excluded tokens are never drawn, whatever their logits") {
    const Ids free = generate_alone({3, 1, 4}, greedy);
    GenerationOptions options = greedy;
    options.excluded_tokens = free;
    const Ids others = generate_alone({3, 1, 4}, options);
    CHECK(std::find_first_of(others.begin(), others.end(), free.begin(), free.end()) == others.end());
    // The largest of those that are left, computed without a cache; free again on the same state and by draws.
    Ids sequence{3, 1, 4};
    for (int i = 0; i < 12; ++i) {
      auto state = model().new_state({.max_length = 64});
      std::vector<double> logits = values<Device>(model().extend(state, sequence));
      for (const Token token : free) logits[static_cast<std::size_t>(token)] = -1e300;
      sequence.push_back(argmax(std::span<const double>(logits)));
    }
    CHECK(others == Ids(sequence.begin() + 3, sequence.end()));
    auto state = model().new_state({.batch = 2, .max_length = 400});
    for (int call = 0; call < 4; ++call) {
      state.reset();
      options.excluded_tokens = call % 2 ? Ids{} : Ids{0, 5, 17, 28, 5};
      options.sampling = {.temperature = call < 2 ? 0. : 3., .repetition_penalty = 1.2};
      options.max_new_tokens = 300;
      const Prompts output = generate(model(), state, Prompts{{3, 1, 4}, {17}}, options);
      bool met = false;
      for (const Ids& row : output)
        for (const Token token : {0, 5, 17, 28}) met = met || std::find(row.begin(), row.end(), token) != row.end();
      CHECK(met == (call % 2 == 1));
    }
    Ids all_but_one(28);
    std::iota(all_but_one.begin(), all_but_one.end(), 1);
    options.excluded_tokens = all_but_one;
    options.max_new_tokens = 5;
    CHECK(generate_alone({3}, options) == Ids{0, 0, 0, 0, 0});
  }

  TEST_CASE("wrong input is refused by name and leaves the state as it was") {
    auto state = model().new_state({.batch = 2, .max_length = 8});
    generate(model(), state, Prompts{{1}, {2}}, {.max_new_tokens = 3});
    const auto before = state.to_bytes();
    const auto refused = [&](const Prompts& prompts, const GenerationOptions& options, const char* message) {
      CHECK_THROWS_WITH_AS(generate(model(), state, prompts, options), message, Error);
      CHECK(state.to_bytes() == before);
    };
    refused({{1}}, {}, "zamba: generate: 1 prompts for a state of 2 rows");
    refused({{1}, {}}, {}, "zamba: generate: the prompt of row 1 is empty, at least one token is needed");
    refused({{1}, {2, 29}}, {}, "zamba: generate: token 29 at position 1 of row 1 is outside the vocabulary of 29");
    refused({{-3}, {2}}, {}, "zamba: generate: token -3 at position 0 of row 0 is outside the vocabulary of 29");
    refused({{1}, {1, 2, 3, 4, 5, 6}}, {},
            "zamba: generate: row 1 holds 3 positions, and its prompt of 6 would exceed max_length 8");
    refused({{1}, {2}}, {.max_new_tokens = -1}, "zamba: GenerationOptions: max_new_tokens must be 0 or more, got -1");
    refused({{1}, {2}}, {.stop_tokens = {2, 32000}},
            "zamba: GenerationOptions: stop token 32000 is outside the vocabulary of 29");
    refused({{1}, {2}}, {.excluded_tokens = {-1}},
            "zamba: GenerationOptions: excluded token -1 is outside the vocabulary of 29");
    Ids all(29);
    std::iota(all.begin(), all.end(), 0);
    refused({{1}, {2}}, {.excluded_tokens = all},
            "zamba: GenerationOptions: excluded tokens are all of the vocabulary of 29");
    refused({{1}, {2}}, {.sampling = {.top_p = 2}},
            "zamba: SamplerOptions: top_p must be above 0 and at most 1 (off), got 2");
  }
}
