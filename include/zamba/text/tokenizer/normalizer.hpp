// SPDX-License-Identifier: MIT
// What happens to a text before merging: Normalizer changes it, PreTokenizer splits it into words, beyond whose ends
// nothing merges. A file may let a text grow, but within bounds: a few steps that each double it would fill any memory.
//
//   Prepend     "the river" -> "▁the river"          never a text that is empty
//   Replace     "▁the river" -> "▁the▁river"
//   Metaspace   "the river" -> "▁the", "▁river"      both of the above, and split before each mark
//   ByteLevel   "the river" -> "the", "Ġriver"       words by GPT-2's pattern, bytes as characters
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/io/json_part.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/text/replace_all.hpp>
#include <zamba/text/tokenizer/byte_level.hpp>
#include <zamba/text/unicode/nfc.hpp>
#include <zamba/text/unicode/utf8.hpp>

namespace zamba::detail {

/// How many times as long steps may make a text, and how many steps there may be.
inline constexpr std::size_t most_growth = 64, most_steps = 64;

/// A bound on what steps make of a text.
struct Growth {
  const std::string& place;  // of the steps, for the message
  std::size_t given;         // bytes of the text

  void check(std::size_t size) const {
    require(size / most_growth <= given, place, ": would make more than ", most_growth, " times as much of a text of ",
            given, " bytes");
  }
};

/// {"type": "Replace", "pattern": {"String": from}, "content": to}, of a normalizer or a decoder.
inline std::pair<std::string, std::string> read_replace(const JsonPart& part) {
  const JsonPart from = part["pattern"]["String"];
  if (from.is_null() || from.text().empty()) from.refuse("a text; other patterns are not supported");
  return {from.text(), part["content"].text()};
}

class Normalizer {
 public:
  Normalizer() = default;
  /// The value of "normalizer".
  explicit Normalizer(const JsonPart& part) : place_(part.place()) {
    read(part);
    require(steps_.size() <= most_steps, place_, ": at most ", most_steps, " steps are supported, came ",
            steps_.size());
  }

  std::string operator()(std::string_view given) const {
    std::string text(given);
    const Growth growth{place_, given.size()};
    const auto check = [&](std::size_t size) { growth.check(size); };
    for (const Step& step : steps_) {
      if (step.kind == prepend && !text.empty()) text.insert(0, step.to);
      if (step.kind == replace) text = replace_all(text, step.from, step.to, check);
      if (step.kind == nfc) text = Nfc::of(text);
      check(text.size());
    }
    return text;
  }

 private:
  enum Kind { prepend, replace, nfc };
  struct Step {
    Kind kind;
    std::string from, to;
  };

  void read(const JsonPart& part) {
    if (part.is_null()) return;
    const std::string& type = part["type"].text();
    if (type == "Sequence") {
      part["normalizers"].each([&](const JsonPart& step) { read(step); });
    } else if (type == "Prepend") {
      steps_.push_back({prepend, {}, part["prepend"].text()});
    } else if (type == "Replace") {
      auto [from, to] = read_replace(part);
      steps_.push_back({replace, std::move(from), std::move(to)});
    } else if (type == "NFC") {
      steps_.push_back({nfc, {}, {}});
    } else {
      fail(part.place(), ": type ", quote(type), " is not supported, wanted Prepend, Replace, NFC or Sequence");
    }
  }

  std::vector<Step> steps_;
  std::string place_;
};

/// One of: nothing, Metaspace (Llama), ByteLevel (GPT-2).
class PreTokenizer {
 public:
  PreTokenizer() = default;
  /// The value of "pre_tokenizer".
  explicit PreTokenizer(const JsonPart& part) { read(part); }

  /// Whether words are bytes written as characters, and so a character there is a byte of the text.
  bool by_bytes() const { return kind_ == byte_level; }
  /// A text as words have it.
  std::string written(std::string_view text) const {
    return by_bytes() ? ByteAlphabet::get().write(text) : std::string(text);
  }

  /// Calls f(word) with each word of the text, from left to right. `first`: the text begins with the whole one.
  template <class F>
  void split(std::string_view text, bool first, F&& f) const {
    if (kind_ == nothing || text.empty()) return f(text);
    if (kind_ == metaspace) {
      std::string marked = replace_all(text, " ", mark_);
      if ((scheme_ == always || (scheme_ == at_first && first)) && !marked.starts_with(mark_)) marked.insert(0, mark_);
      std::size_t begin = 0;  // of the word; each mark begins the next one
      for (std::size_t at = 0; split_ && (at = marked.find(mark_, at)) != marked.npos; at += mark_.size()) {
        if (at > begin) f(std::string_view(marked).substr(begin, at - begin));
        begin = at;
      }
      return f(std::string_view(marked).substr(begin));
    }
    const std::string spaced =
        scheme_ == always && !text.starts_with(' ') ? " " + std::string(text) : std::string(text);
    for (std::size_t begin = 0; begin < spaced.size();) {
      const std::size_t end = split_ ? end_of_word(spaced, begin) : spaced.size();
      f(ByteAlphabet::get().write(std::string_view(spaced).substr(begin, end - begin)));
      begin = end;
    }
  }

 private:
  enum Kind { nothing, metaspace, byte_level };
  enum Scheme { never, at_first, always };  // where a text gets a space in front

  void read(const JsonPart& part) {
    if (part.is_null()) return;
    const std::string& type = part["type"].text();
    if (type == "Sequence") {  // of one, as some files have it
      part["pretokenizers"].each([&](const JsonPart& step) { read(step); });
      return;
    }
    require(kind_ == nothing, part.place(), ": one pre-tokenizer is supported, this is another one");
    if (type == "Metaspace") {
      kind_ = metaspace;
      mark_ = part["replacement"].text();
      if (mark_.empty() || character_at(mark_, 0).size != mark_.size()) part["replacement"].refuse("one character");
      // Before prepend_scheme there was add_prefix_space.
      const std::string scheme =
          part["prepend_scheme"].text_or(part["add_prefix_space"].flag(true) ? "always" : "never");
      scheme_ = scheme == "always" ? always : scheme == "first" ? at_first : never;
      if (scheme_ == never && scheme != "never") part["prepend_scheme"].refuse("always, first or never");
      split_ = part["split"].flag(true);
    } else if (type == "ByteLevel") {
      kind_ = byte_level;
      scheme_ = part["add_prefix_space"].flag(true) ? always : never;
      split_ = part["use_regex"].flag(true);
    } else {
      fail(part.place(), ": type ", quote(type), " is not supported, wanted Metaspace, ByteLevel or none");
    }
  }

  Kind kind_ = nothing;
  Scheme scheme_ = never;
  bool split_ = true;
  std::string mark_;
};

}  // namespace zamba::detail
