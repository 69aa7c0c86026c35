// SPDX-License-Identifier: MIT
#include <zamba/eval/multiple_choice.hpp>

#include <doctest/doctest.h>
#include <zamba/any_model.hpp>

#include "tests/support/judge.hpp"

namespace {

using namespace zamba_test;

/// Letters and four other characters; "th", as an example of tokens that several characters share, is one.
std::vector<Token> encode(std::string_view text) {
  std::vector<Token> tokens;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text.substr(i, 2) == "th") {
      tokens.push_back(28);
      ++i;
    } else {
      tokens.push_back(text[i] == ' ' ? 26 : text[i] == '\n' ? 27 : static_cast<Token>((text[i] & 0x1f) % 26));
    }
  }
  return tokens;
}

/// log p of all tokens from `at` on, each from a state of its own, by the definition.
double direct(const std::vector<Token>& all, std::size_t at) {
  double total = 0;
  for (; at < all.size(); ++at) {
    auto state = model().new_state({.max_length = 256});
    const auto logits = model().extend(state, std::span<const Token>(all).first(at));
    double sum = 0;
    for (Index v = 0; v < vocabulary; ++v) sum += std::exp(logits(0, v));
    total += logits(0, all[at]) - std::log(sum);
  }
  return total;
}

double direct(const std::string& prompt, const std::string& choice, std::optional<Token> begin = {}) {
  std::vector<Token> all = encode(prompt + choice);
  if (begin) all.insert(all.begin(), *begin);
  return direct(all, encode(prompt).size() + (begin ? 1 : 0));
}

std::vector<MultipleChoiceItem> questions() {
  return {{.name = "first", .context = "what is near", .choices = {{"sea"}, {"the far land"}, {"o"}}, .answer = 0},
          {.name = "second", .context = "who came then  ", .choices = {{"them"}, {"nobody came"}}, .answer = 1},
          {.name = "third",  // a blank: prompts of their own, and one continuation
           .choices = {{"was small", "a cup fell because it"}, {"was small", "a cup fell because the table"}},
           .answer = 0}};
}

std::vector<ItemResult> ask(const std::vector<MultipleChoiceItem>& items,
                            const std::vector<MultipleChoiceItem>& shots = {}, Index n = 0,
                            const MultipleChoiceOptions& options = {}) {
  return multiple_choice(model(), encode, items, shots, n, options);
}

}  // namespace

TEST_SUITE("eval/multiple_choice") {
  TEST_CASE("scores are those of each choice computed by itself") {
    const auto results = ask(questions());
    REQUIRE(results.size() == 3);
    const std::vector<std::vector<std::pair<std::string, std::string>>> wanted{
        {{"what is near", " sea"}, {"what is near", " the far land"}, {"what is near", " o"}},
        {{"who came then", "   them"}, {"who came then", "   nobody came"}},  // spaces at the end go to the choice
        {{"a cup fell because it", " was small"}, {"a cup fell because the table", " was small"}}};
    for (std::size_t i = 0; i < 3; ++i)
      for (std::size_t c = 0; c < wanted[i].size(); ++c) {
        const auto& [prompt, choice] = wanted[i][c];
        CHECK(results[i].choices[c].log_likelihood == near(direct(prompt, choice)));
        CHECK(results[i].choices[c].tokens == static_cast<Index>(encode(choice).size()));
      }
    CHECK(results[0].choices[1].tokens == 12);  // " the far land", "th" being one
    CHECK(results[0].choices[1].characters == 12);
    CHECK(results[2].answer == 0);
    CHECK(results[2].name == "third");
  }

  TEST_CASE("shots: the first so many of one heading stand before the question") {
    std::vector<MultipleChoiceItem> items = questions(), shots = questions();
    items[0].heading = items[2].heading = shots[1].heading = shots[2].heading = "on cups\n\n";
    items.push_back(items[0]);
    const auto results = ask(items, shots, 1);
    const std::string of_cups = "on cups\n\nwho came then   nobody came\n\n", plain = "what is near sea\n\n";
    CHECK(results[0].choices[1].log_likelihood == near(direct(of_cups + "what is near", " the far land")));
    CHECK(results[1].choices[0].log_likelihood == near(direct(plain + "who came then", "   them")));
    CHECK(results[2].choices[1].log_likelihood == near(direct(of_cups + "a cup fell because the table", " was small")));
    CHECK(results[3].choices[2].log_likelihood == near(direct(of_cups + "what is near", " o")));
    const std::string two = of_cups + "a cup fell because it was small\n\n";
    CHECK(ask({items[0]}, shots, 2)[0].choices[0].log_likelihood == near(direct(two + "what is near", " sea")));
    CHECK_THROWS_WITH_AS(
        ask(items, shots, 2),
        "zamba: multiple_choice: 2 shots are wanted for second, and 1 items with its heading are there", Error);
  }

  TEST_CASE("a token before each prompt; without it a prompt is not empty") {
    const MultipleChoiceItem item{.name = "bare", .choices = {{"sea"}, {"land"}}};
    CHECK_THROWS_WITH_AS(ask({item}),
                         "zamba: multiple_choice: the prompt of bare is empty; `begin`, a token before each prompt, "
                         "would make it one token",
                         Error);
    const auto results = ask({item, questions()[0]}, {}, 0, {.begin = 5});
    CHECK(results[0].choices[0].log_likelihood == near(direct("", " sea", 5)));
    CHECK(results[1].choices[2].log_likelihood == near(direct("what is near", " o", 5)));
  }

  TEST_CASE("a prompt whose end is one token with the beginning of a choice") {
    // Without spaces "oat" and "hat" are o a th a t. As many tokens as the prompt alone has, three, are the prompt.
    MultipleChoiceItem item{.name = "joined", .context = "oat", .choices = {{"hat"}, {"hot"}}};
    const Encode joined = [](std::string_view text) {
      std::string together(text);
      std::erase(together, ' ');
      return encode(together);
    };
    const auto results = multiple_choice(model(), joined, std::vector{item}, {}, 0, {});
    const std::vector<Token> whole = encode("oathot");
    CHECK(results[0].choices[1].tokens == 2);
    CHECK(results[0].choices[1].log_likelihood == near(direct(whole, 3)));
    item.choices[0].text = "h";
    CHECK_THROWS_WITH_AS(multiple_choice(model(), joined, std::vector{item}, {}, 0, {}),
                         "zamba: multiple_choice: a choice of joined has no token of its own", Error);
  }

  TEST_CASE("picks by sum, by token and by character; the first of equal ones") {
    const ItemResult result{"", 1, {{-6, 2, 12}, {-7, 4, 8}, {-5, 1, 5}}};
    CHECK(result.pick() == 2);
    CHECK(result.pick_per_token() == 1);      // -3, -1.75, -5
    CHECK(result.pick_per_character() == 0);  // -0.5, -0.875, -1
    CHECK(ItemResult{"", 0, {{-5, 1, 1}, {-5, 1, 1}}}.pick() == 0);
    CHECK(detail::character_count("naïve 語") == 7);
  }

  TEST_CASE("accuracy and its standard error") {
    const ItemResult right{"", 1, {{-2, 1, 1}, {-1, 1, 1}}}, wrong{"", 0, right.choices};
    const std::vector<ItemResult> results{right, wrong, right, right, wrong};
    const Accuracy got = accuracy(results);
    CHECK(got.right == 3);
    CHECK(got.value() == doctest::Approx(0.6));
    // The deviation of 1, 0, 1, 1, 0 over n - 1, divided by the root of n.
    CHECK(got.standard_error() == doctest::Approx(std::sqrt((3 * 0.16 + 2 * 0.36) / 4 / 5)));
    CHECK(accuracy(std::vector{right}).standard_error() == 0);
    CHECK(accuracy(results, &ItemResult::pick_per_token).right == 3);
  }

  TEST_CASE("a model whose type is chosen at run time gives the same") {
    const auto small = model().to<float>();
    const AnyModel any(model().to<float>(), "any");
    const auto results = multiple_choice(small, encode, questions(), {}, 0, {}),
               again = multiple_choice(any, encode, questions(), {}, 0, {});
    for (std::size_t i = 0; i < 3; ++i)
      for (std::size_t c = 0; c < results[i].choices.size(); ++c)
        CHECK(results[i].choices[c].log_likelihood == again[i].choices[c].log_likelihood);
  }

  TEST_CASE("a NaN is that of an item and a choice") {
    const auto model = nan_where_read<Transformer, double>(28);  // "th"
    std::vector<MultipleChoiceItem> items = questions();
    items.resize(1);
    CHECK_THROWS_WITH_AS(multiple_choice(model, encode, items, {}, 0, {}),
                         "zamba: multiple_choice: item first: a logit of choice 1 is NaN", Error);
    CHECK_THROWS_WITH_AS(multiple_choice(model, Encode(), items, {}, 0, {}),
                         "zamba: multiple_choice: there is no way to encode texts, `encode` is empty", Error);
  }

  TEST_CASE("wrong input is refused by name") {
    std::vector<MultipleChoiceItem> items = questions();
    const auto refused = [&](const std::vector<MultipleChoiceItem>& asked, const char* message,
                             const MultipleChoiceOptions& options = {}) {
      CHECK_THROWS_WITH_AS(ask(asked, {}, 0, options), message, Error);
    };
    refused({}, "zamba: multiple_choice: there are no items");
    refused(items, "zamba: multiple_choice: item third has 31 tokens, over max_length 30", {.max_length = 30});
    items[1].answer = 2;
    refused(items, "zamba: multiple_choice: the answer of second is choice 2 of 2, counted from 0");
    items[1].choices.resize(1);
    refused(items, "zamba: multiple_choice: item second has 1 choices, at least 2 are needed");
    items[0].choices[1].text = "";
    refused(items, "zamba: multiple_choice: a choice of first is empty");
    CHECK_THROWS_WITH_AS(ask(questions(), {}, -1),
                         "zamba: multiple_choice: the number of shots must be 0 or more, got -1", Error);
    CHECK_THROWS_WITH_AS(
        multiple_choice(model(), encode, questions(), {}, 0, {}, [](Index done, Index) { return done < 2; }),
        "zamba: multiple_choice: ended after 2 of 3 items", Error);
  }
}
