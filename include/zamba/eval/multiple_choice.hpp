// SPDX-License-Identifier: MIT
// Multiple choice: a model picks the choice that it finds likeliest as the continuation of a context.
//
//   prompt   heading  n shots, each: context beginning " " text "\n\n"  context beginning_c
//   score_c  sum of log p of the tokens of " " text_c after the prompt
//   picks    the largest score_c;  score_c / characters of text_c;  score_c / its tokens;  the first of equal ones
//
// The first two picks are acc and acc_norm of EleutherAI's lm-evaluation-harness (arXiv 2405.14782), whose way to cut
// tokens this follows: prompt and choice are encoded as one text, and what lies behind as many tokens as the prompt
// alone has belongs to the choice; spaces that end the prompt belong to the choice.
//
// What the prompts of items with one heading begin with, the shots above all, is read once; so is what the prompts of
// an item's choices begin with. Its state is copied for each, and the rest of all choices is read as one ragged batch.
// Numeric contract: that of log_likelihood.hpp. A score is that of the choice alone, to the rounding of another split.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/eval/callback.hpp>
#include <zamba/eval/log_likelihood.hpp>
#include <zamba/number.hpp>

namespace zamba {

/// One way to go on.
struct Choice {
  std::string text;            // what is judged, without the space before it
  std::string beginning = {};  // belongs to the prompt, for this choice only: what fills a blank
};

struct MultipleChoiceItem {
  std::string name = {};     // says in messages which it is
  std::string heading = {};  // before the shots; items with one heading may be each other's shots
  std::string context = {};  // the question
  std::vector<Choice> choices = {};
  Index answer = 0;  // the right choice
};

/// Text to tokens; adds nothing to it.
using Encode = std::function<std::vector<Token>(std::string_view)>;

struct MultipleChoiceOptions {
  std::optional<Token> begin{};  // the token that begins a text, before each prompt
  Index max_length = 0;          // a longer prompt is an Error; 0: as long as any prompt is
};

struct ChoiceScore {
  double log_likelihood = 0;
  Index tokens = 0, characters = 0;  // of the choice; characters are those of Unicode

  double per_token() const { return log_likelihood / static_cast<double>(tokens); }
  double per_character() const { return log_likelihood / static_cast<double>(characters); }
};

/// What the model made of one item.
struct ItemResult {
  std::string name;
  Index answer = 0;
  std::vector<ChoiceScore> choices;

  Index pick() const {
    return best([](const ChoiceScore& score) { return score.log_likelihood; });
  }
  Index pick_per_token() const { return best(std::mem_fn(&ChoiceScore::per_token)); }
  Index pick_per_character() const { return best(std::mem_fn(&ChoiceScore::per_character)); }

 private:
  template <class F>
  Index best(F&& score) const {
    return std::max_element(choices.begin(), choices.end(),
                            [&](const auto& a, const auto& b) { return score(a) < score(b); }) -
           choices.begin();
  }
};

struct Accuracy {
  Index right = 0, count = 0;

  double value() const { return static_cast<double>(right) / static_cast<double>(count); }
  /// Of the value, as an estimate of that over all items there could be; 0 for a single item.
  double standard_error() const {
    return count < 2 ? 0 : std::sqrt(value() * (1 - value()) / static_cast<double>(count - 1));
  }
};

/// How often `pick`, a member of ItemResult, is right.
inline Accuracy accuracy(std::span<const ItemResult> results, Index (ItemResult::*pick)() const = &ItemResult::pick) {
  const auto right = [&](const ItemResult& result) { return (result.*pick)() == result.answer; };
  return {std::count_if(results.begin(), results.end(), right), static_cast<Index>(results.size())};
}

/// Throws unless the item can be asked.
inline void check(const MultipleChoiceItem& item) {
  require(item.choices.size() >= 2, "multiple_choice: item ", item.name, " has ", item.choices.size(),
          " choices, at least 2 are needed");
  require(item.answer >= 0 && item.answer < static_cast<Index>(item.choices.size()), "multiple_choice: the answer of ",
          item.name, " is choice ", item.answer, " of ", item.choices.size(), ", counted from 0");
  for (const Choice& choice : item.choices)
    require(!choice.text.empty(), "multiple_choice: a choice of ", item.name, " is empty");
}

/// What stands before the context of an item: its heading and the first n of the shots with that heading.
inline std::string prompt_before(const MultipleChoiceItem& item, std::span<const MultipleChoiceItem> shots, Index n) {
  std::string text = item.heading;
  Index found = 0;
  for (const MultipleChoiceItem& shot : shots) {
    if (found == n) break;
    if (shot.heading != item.heading) continue;
    const Choice& right = shot.choices[static_cast<std::size_t>(shot.answer)];
    text += shot.context + right.beginning + " " + right.text + "\n\n";
    ++found;
  }
  require(found == n, "multiple_choice: ", n, " shots are wanted for ", item.name, ", and ", found,
          " items with its heading are there");
  return text;
}

namespace detail {

/// The tokens of an item's choices: row by row a prompt and the choice behind it.
struct EncodedItem {
  std::vector<std::vector<Token>> rows;
  std::vector<std::size_t> prompts;  // lengths of the rows' prompts
  std::size_t common = 0;            // tokens with which all prompts begin, the last one of the shortest left out
};

inline std::size_t common_length(std::span<const Token> a, std::span<const Token> b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

inline EncodedItem encode_item(const MultipleChoiceItem& item, const std::string& before, const Encode& encode,
                               const MultipleChoiceOptions& options) {
  EncodedItem result;
  for (const Choice& choice : item.choices) {
    const std::string text = before + item.context + choice.beginning + " " + choice.text;
    std::size_t cut = text.size() - choice.text.size();
    while (cut > 0 && std::string_view(" \t\n\r").find(text[cut - 1]) != std::string_view::npos) --cut;
    std::vector<Token> row = encode(text);
    std::size_t prompt = cut > 0 ? encode(std::string_view(text).substr(0, cut)).size() : 0;
    if (options.begin) {
      row.insert(row.begin(), *options.begin);
      ++prompt;
    }
    require(prompt > 0, "multiple_choice: the prompt of ", item.name,
            " is empty; `begin`, a token before each prompt, would make it one token");
    require(prompt < row.size(), "multiple_choice: a choice of ", item.name, " has no token of its own");
    require(options.max_length == 0 || static_cast<Index>(row.size()) <= options.max_length, "multiple_choice: item ",
            item.name, " has ", row.size(), " tokens, over max_length ", options.max_length);
    result.rows.push_back(std::move(row));
    result.prompts.push_back(prompt);
  }
  // The last token of a prompt is read by each row for itself: behind it stand the logits of the choice's first token.
  result.common = *std::min_element(result.prompts.begin(), result.prompts.end()) - 1;
  for (const auto& row : result.rows) result.common = std::min(result.common, common_length(result.rows.front(), row));
  return result;
}

/// The choices' scores. `state` holds the first `known` tokens of all rows; `name` is that of the item, for messages.
template <InferenceModel M>
std::vector<ChoiceScore> score_item(const M& model, const typename M::StateType& known_state, std::size_t known,
                                    const EncodedItem& item, const std::string& name) {
  auto shared = known_state;
  if (item.common > known)
    model.extend(shared, std::span<const Token>(item.rows.front()).subspan(known, item.common - known));
  auto rows = shared.gather(std::vector<Index>(item.rows.size(), 0));
  std::vector<Token> tokens, targets;
  std::vector<Index> lengths;
  for (std::size_t r = 0; r < item.rows.size(); ++r) {
    const std::vector<Token>& row = item.rows[r];
    lengths.push_back(static_cast<Index>(row.size() - 1 - item.common));
    for (std::size_t i = item.common; i + 1 < row.size(); ++i) {
      tokens.push_back(row[i]);
      targets.push_back(i + 1 < item.prompts[r] ? -1 : row[i + 1]);
    }
  }
  const auto values = log_likelihoods_or_nan(model, rows, {tokens, lengths}, targets);
  std::vector<ChoiceScore> scores;
  auto value = values.begin();
  for (std::size_t r = 0; r < item.rows.size(); value += lengths[r++]) {
    scores.push_back({0, static_cast<Index>(item.rows[r].size() - item.prompts[r])});
    for (auto at = value; at != value + lengths[r]; ++at) scores.back().log_likelihood += *at;
    require(!is_nan(scores.back().log_likelihood), "multiple_choice: item ", name, ": a logit of choice ", r,
            " is NaN");
  }
  return scores;
}

inline Index character_count(std::string_view text) {  // the bytes that do not continue a character of UTF-8
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

template <InferenceModel M, EvaluationCallback Callback>
std::vector<ItemResult> multiple_choice(const M& model, const Encode& encode, std::span<const MultipleChoiceItem> items,
                                        std::span<const MultipleChoiceItem> shots, Index n,
                                        const MultipleChoiceOptions& options, Callback&& callback) {
  require(!items.empty(), "multiple_choice: there are no items");
  require(encode != nullptr, "multiple_choice: there is no way to encode texts, `encode` is empty");
  require(n >= 0, "multiple_choice: the number of shots must be 0 or more, got ", n);
  for (const auto& list : {items, shots})
    for (const MultipleChoiceItem& item : list) check(item);
  std::vector<ItemResult> results;
  for (std::size_t first = 0, end = 0; first < items.size(); first = end) {
    // A run of items with one heading, whose prompts begin alike.
    const std::string before = prompt_before(items[first], shots, n);
    std::vector<EncodedItem> run;
    std::size_t known = static_cast<std::size_t>(-1), longest = 0;
    for (; end < items.size() && items[end].heading == items[first].heading; ++end) {
      run.push_back(encode_item(items[end], before, encode, options));
      known = std::min({known, run.back().common, common_length(run.front().rows[0], run.back().rows[0])});
      for (const auto& row : run.back().rows) longest = std::max(longest, row.size());
    }
    auto state = model.new_state({.batch = 1, .max_length = static_cast<Index>(longest)});
    if (known > 0) model.extend(state, std::span<const Token>(run.front().rows[0]).first(known));
    for (std::size_t i = first; i < end; ++i) {
      results.push_back(
          {items[i].name, items[i].answer, score_item(model, state, known, run[i - first], items[i].name)});
      for (std::size_t c = 0; c < items[i].choices.size(); ++c)
        results.back().choices[c].characters = character_count(items[i].choices[c].text);
      const auto done = static_cast<Index>(results.size()), all = static_cast<Index>(items.size());
      require(callback(done, all), "multiple_choice: ended after ", done, " of ", all, " items");
    }
  }
  return results;
}

}  // namespace detail

/// Asks every item after n shots. An Error names an item whose logits hold a NaN. `shots` may hold more than are used;
/// the items are none of them.
template <InferenceModel M, EvaluationCallback Callback = GoOn>
std::vector<ItemResult> multiple_choice(const M& model, const Encode& encode, std::span<const MultipleChoiceItem> items,
                                        std::span<const MultipleChoiceItem> shots, Index n,
                                        const MultipleChoiceOptions& options, Callback&& callback = {}) {
  return detail::or_out_of_memory(
      "multiple_choice", [&] { return detail::multiple_choice(model, encode, items, shots, n, options, callback); });
}

}  // namespace zamba
