// SPDX-License-Identifier: MIT
#include <zamba/generate/speculative.hpp>

#include <doctest/doctest.h>
#include <zamba/any_model.hpp>
#include <zamba/generate/generator.hpp>

#include "../support/devices.hpp"
#include "../support/nets.hpp"

namespace {

using namespace zamba_test;

const Model<Hybrid, double, TestDevice>& target_model() {
  static const auto model = random_model<Hybrid, double, TestDevice>();
  return model;
}

/// The model with every weight moved a little: a draft that is often right.
const Model<Hybrid, double, TestDevice>& near_model() {
  static const auto near = [] {
    auto near = target_model().to<double>();
    for (std::size_t i = 0; i < near.entries().size(); ++i) {
      std::vector<double> values = near.read(near.entries()[i]);
      Random random(Seed{4}, i);
      for (double& value : values) value *= 1 + 0.02 * random.normal();
      near.write(near.entries()[i], values);
    }
    return near;
  }();
  return near;
}

const Model<Plain, float, TestDevice>& other_model() {
  static const auto model = random_model<Plain, float, TestDevice>({9});
  return model;
}

std::vector<Token> greedy_tokens(const std::vector<Token>& prompt, Index count, const std::vector<Token>& stops = {},
                                 Index max_length = 256) {
  auto state = target_model().new_state({.max_length = max_length});
  return generate(target_model(), state, prompt,
                  {.sampling = {.temperature = 0}, .max_new_tokens = count, .stop_tokens = stops});
}

template <class Draft>
SpeculativeOutput run(const Draft& draft, const std::vector<Token>& prompt, const SpeculativeOptions& options,
                      Index max_length = 256) {
  auto state = target_model().new_state({.max_length = max_length});
  auto draft_state = draft.new_state({.max_length = max_length});
  return generate_speculatively(target_model(), state, draft, draft_state, prompt, options);
}

}  // namespace

TEST_SUITE("generate/speculative") {
  TEST_CASE("the tokens of greedy decoding, whatever the draft") {
    const std::vector<Token> wanted = greedy_tokens({3, 1, 4}, 100);
    for (const Index k : {0, 1, 2, 4, 7, 40}) {
      CAPTURE(k);
      const SpeculativeOptions options{.max_new_tokens = 100, .draft_tokens = k};
      const auto itself = run(target_model(), {3, 1, 4}, options), near = run(near_model(), {3, 1, 4}, options),
                 other = run(other_model(), {3, 1, 4}, options);
      CHECK(itself.tokens == wanted);
      CHECK(near.tokens == wanted);
      CHECK(other.tokens == wanted);
      CHECK(itself.accepted == itself.proposed);
      CHECK(itself.passes == (100 + k) / (k + 1));
      for (const auto& output : {itself, near, other}) CHECK(output.passes + output.accepted == 100);
      if (k < 2) continue;
      CHECK(near.accepted > 0);  // both ways were taken
      CHECK(near.accepted < near.proposed);
      CHECK(other.accepted < other.proposed);
    }
  }

  TEST_CASE("it ends as generate() does, and both states go on from there") {
    const std::vector<Token> whole = greedy_tokens({3, 1, 4}, 40);
    for (const std::vector<Token>& stops : {std::vector<Token>{}, {whole[5], whole[9]}, {whole[0]}}) {
      for (const Index count : {0, 1, 2, 17}) {
        for (const Index k : {1, 3, 6}) {
          CAPTURE(count);
          CAPTURE(k);
          auto state = target_model().new_state({.max_length = 256});
          auto draft_state = near_model().new_state({.max_length = 256});
          const auto output =
              generate_speculatively(target_model(), state, near_model(), draft_state, {3, 1, 4},
                                     {.max_new_tokens = count, .draft_tokens = k, .stop_tokens = stops});
          const auto wanted = greedy_tokens({3, 1, 4}, count, stops);
          CHECK(output.tokens == wanted);
          const Index held = 3 + static_cast<Index>(wanted.size()) - 1;
          CHECK(state.length() == held);
          CHECK(draft_state.length() == held);
          const Token last = wanted.empty() ? 4 : wanted.back();
          const auto more = generate_speculatively(target_model(), state, near_model(), draft_state, {last},
                                                   {.max_new_tokens = 10, .draft_tokens = k});
          std::vector<Token> all = wanted;
          all.insert(all.end(), more.tokens.begin(), more.tokens.end());
          CHECK(all == std::vector<Token>(whole.begin(), whole.begin() + static_cast<Index>(all.size())));
        }
      }
    }
    for (const Index max_length : {3, 4, 5, 9, 20})
      CHECK(run(near_model(), {3, 1, 4}, {.max_new_tokens = 40}, max_length).tokens ==
            greedy_tokens({3, 1, 4}, 40, {}, max_length));
  }

  TEST_CASE("excluded tokens are neither given nor proposed") {
    const std::vector<Token> free = greedy_tokens({3, 1, 4}, 12);
    const std::vector<Token> excluded(free.begin(), free.begin() + 3);
    auto alone = target_model().new_state({.max_length = 64});
    const auto wanted = generate(target_model(), alone, std::vector<Token>{3, 1, 4},
                                 {.sampling = {.temperature = 0}, .max_new_tokens = 12, .excluded_tokens = excluded});
    for (const Index k : {0, 1, 4}) {
      auto state = target_model().new_state({.max_length = 64});
      auto draft_state = near_model().new_state({.max_length = 64});
      const auto output =
          generate_speculatively(target_model(), state, near_model(), draft_state, {3, 1, 4},
                                 {.max_new_tokens = 12, .draft_tokens = k, .excluded_tokens = excluded});
      CHECK(output.tokens == wanted);
      CHECK((k == 0 || output.accepted > 0));
    }
  }

  TEST_CASE("logits that are NaN are the model's or the draft's, and the tokens before them are not lost") {
    const std::vector<Token> prompt{3, 1, 4};
    const auto whole = random_model<Transformer, double, TestDevice>();
    auto alone = whole.new_state({.max_length = 64});
    const auto free = generate(whole, alone, prompt, {.sampling = {.temperature = 0}, .max_new_tokens = 12});
    const auto at = std::find_if(free.begin() + 2, free.end(), [&](Token token) {
      return std::find(prompt.begin(), prompt.end(), token) == prompt.end() &&
             std::find(free.begin(), free.begin() + 2, token) == free.begin() + 2;
    });
    REQUIRE(at != free.end());
    const auto broken = nan_where_read<Transformer, double, TestDevice>(*at);
    const auto error = [&](const auto& of_model, const auto& draft, Index k) {
      auto state = of_model.new_state({.max_length = 64});
      auto draft_state = draft.new_state({.max_length = 64});
      try {
        generate_speculatively(of_model, state, draft, draft_state, prompt, {.max_new_tokens = 12, .draft_tokens = k});
      } catch (const GenerationError& found) {
        return found;
      }
      return GenerationError("no error", {{}}, {});
    };
    const auto begins = [&](const std::vector<Token>& tokens) {
      return std::equal(tokens.begin(), tokens.end(), free.begin());
    };
    // In passes of one token all that was read before the NaN is there; longer ones may be lost from their beginning.
    const GenerationError one = error(broken, whole, 0), four = error(broken, whole, 4),
                          draft = error(whole, broken, 4);
    CHECK(std::string(one.what()).starts_with("zamba: generate_speculatively, the model: 1 of 1 rows ended early"));
    CHECK(one.tokens()[0] == std::vector<Token>(free.begin(), at + 1));
    CHECK(std::string(four.what()).starts_with("zamba: generate_speculatively, the model: 1 of 1 rows ended early"));
    CHECK(begins(four.tokens()[0]));
    CHECK(std::string(draft.what()).starts_with("zamba: generate_speculatively, the draft: 1 of 1 rows ended early"));
    CHECK(begins(draft.tokens()[0]));
  }

  TEST_CASE("models whose types are chosen at run time") {
    const AnyModel any(target_model().to<double>(), "any"), draft(near_model().to<float>(), "draft");
    auto state = any.new_state({.max_length = 64});
    auto draft_state = draft.new_state({.max_length = 64});
    CHECK(generate_speculatively(any, state, draft, draft_state, {3, 1, 4}, {.max_new_tokens = 40}).tokens ==
          greedy_tokens({3, 1, 4}, 40));
  }

  TEST_CASE("wrong input is refused by name") {
    auto state = target_model().new_state({.max_length = 8}),
         two = target_model().new_state({.batch = 2, .max_length = 8});
    auto draft_state = near_model().new_state({.max_length = 8});
    const auto refused = [&](auto& of_model, const std::vector<Token>& prompt, const SpeculativeOptions& options,
                             const char* message) {
      CHECK_THROWS_WITH_AS(generate_speculatively(target_model(), of_model, near_model(), draft_state, prompt, options),
                           message, Error);
      CHECK(state.length() == 0);
    };
    refused(two, {1}, {}, "zamba: generate_speculatively: states of one row are needed, got 2 and 1");
    refused(state, {}, {}, "zamba: generate_speculatively: the prompt is empty, at least one token is needed");
    refused(
        state, random_tokens(9), {},
        "zamba: generate_speculatively: the state holds 0 positions, and the prompt of 9 would exceed max_length 8");
    refused(state, {1, 29}, {}, "zamba: generate_speculatively: token 29 is outside the vocabulary of 29");
    refused(state, {1}, {.draft_tokens = -1},
            "zamba: SpeculativeOptions: max_new_tokens and draft_tokens must be 0 or more, got 128 and -1");
    refused(state, {1}, {.stop_tokens = {29}},
            "zamba: SpeculativeOptions: stop token 29 is outside the vocabulary of 29");
    refused(state, {1}, {.excluded_tokens = {3, -1}},
            "zamba: SpeculativeOptions: excluded token -1 is outside the vocabulary of 29");
    near_model().extend(draft_state, {1, 2});
    refused(state, {1}, {}, "zamba: generate_speculatively: the state holds 0 positions, that of the draft 2");
  }
}
