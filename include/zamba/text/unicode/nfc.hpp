// SPDX-License-Identifier: MIT
// Normal form C (Unicode Standard Annex 15): characters are taken apart, their marks put in order, and composed again.
//
//   take apart   U+1EA5 -> U+0061 U+0302 U+0301      until nothing comes apart any more; Hangul by arithmetic
//   order        marks between two starters (class 0) by their combining class, equal ones as they stood
//   compose      each mark with the starter before it, where a composition exists and no mark between blocks it
//
// A text without a character of U+0300 or above is its own normal form and is only read. Linear but for the sorting of
// marks, O(m log m) for m in a row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <zamba/text/unicode/compositions_table.hpp>
#include <zamba/text/unicode/utf8.hpp>

namespace zamba::detail {

class Nfc {
 public:
  /// Bytes that are not UTF-8 stay as they are, and nothing composes across them.
  static std::string of(std::string_view text) {
    constexpr char32_t first_that_changes = 0x300;  // below, every character is its own normal form
    constexpr char32_t bytes = 0x110000;            // stand above all characters: bytes + value
    std::vector<char32_t> codes;
    bool changes = false;
    for (std::size_t at = 0; at < text.size();) {
      const Character character = character_at(text, at);
      const bool is_byte = character.code == no_code;
      codes.push_back(is_byte ? bytes + static_cast<unsigned char>(text[at]) : character.code);
      changes = changes || (!is_byte && character.code >= first_that_changes);
      at += character.size;
    }
    if (!changes) return std::string(text);
    static const Nfc tables;
    std::string result;
    for (const char32_t code : tables.compose(tables.decompose(codes))) {
      if (code < bytes)
        append_utf8(code, result);
      else
        result.push_back(static_cast<char>(code - bytes));
    }
    return result;
  }

 private:
  struct Mark {
    char32_t code;
    int combining_class;
  };

  // Hangul: syllable = base + (lead * vowels + vowel) * tails + tail, tail 0 meaning none.
  static constexpr char32_t syllable_base = 0xac00, lead_base = 0x1100, vowel_base = 0x1161, tail_base = 0x11a7;
  static constexpr char32_t leads = 19, vowels = 21, tails = 28, syllables = leads * vowels * tails;

  Nfc() {
    for (const auto& [composed, first, second] : compositions) {
      parts_[composed] = {first, second};
      composed_[pair(first, second)] = composed;
    }
    for (const auto& [composed, first, second] : decompositions) parts_[composed] = {first, second};
    for (const auto& [from, to] : replacements) parts_[from] = {to, 0};
  }

  static std::uint64_t pair(char32_t first, char32_t second) { return std::uint64_t{first} << 32 | second; }

  static int class_of(char32_t code) {
    if (code < combining_classes[0].first) return 0;
    const auto* after = std::upper_bound(std::begin(combining_classes), std::end(combining_classes), code,
                                         [](char32_t wanted, const ClassRange& range) { return wanted < range.first; });
    return code <= std::prev(after)->last ? std::prev(after)->combining_class : 0;
  }

  void take_apart(char32_t code, std::vector<Mark>& to) const {
    if (code >= syllable_base && code < syllable_base + syllables) {
      const char32_t index = code - syllable_base, tail = index % tails;
      to.push_back({lead_base + index / (vowels * tails), 0});
      to.push_back({vowel_base + index / tails % vowels, 0});
      if (tail) to.push_back({tail_base + tail, 0});
    } else if (const auto at = parts_.find(code); at != parts_.end()) {
      take_apart(at->second.first, to);
      if (at->second.second) take_apart(at->second.second, to);
    } else {
      to.push_back({code, class_of(code)});
    }
  }

  std::vector<Mark> decompose(const std::vector<char32_t>& codes) const {
    std::vector<Mark> marks;
    for (const char32_t code : codes) take_apart(code, marks);
    const auto is_starter = [](const Mark& mark) { return mark.combining_class == 0; };
    for (auto begin = marks.begin(); begin != marks.end();) {
      begin = std::find_if_not(begin, marks.end(), is_starter);
      const auto end = std::find_if(begin, marks.end(), is_starter);
      std::stable_sort(begin, end, [](auto& a, auto& b) { return a.combining_class < b.combining_class; });
      begin = end;
    }
    return marks;
  }

  /// What two characters compose to, or 0.
  char32_t compose(char32_t first, char32_t second) const {
    if (first >= lead_base && first < lead_base + leads && second >= vowel_base && second < vowel_base + vowels)
      return syllable_base + ((first - lead_base) * vowels + second - vowel_base) * tails;
    if (first >= syllable_base && first < syllable_base + syllables && (first - syllable_base) % tails == 0 &&
        second > tail_base && second < tail_base + tails)
      return first + second - tail_base;
    const auto at = composed_.find(pair(first, second));
    return at == composed_.end() ? 0 : at->second;
  }

  std::vector<char32_t> compose(const std::vector<Mark>& marks) const {
    std::vector<char32_t> codes;
    std::size_t starter = marks.size();  // its position in codes; none yet
    int last = -1;                       // class of the last mark after it that stayed
    for (const auto& [code, combining_class] : marks) {
      // A mark reaches the starter unless one of its own class or above stands between.
      if (starter < codes.size() && last < combining_class) {
        if (const char32_t composed = compose(codes[starter], code)) {
          codes[starter] = composed;
          continue;
        }
      }
      last = combining_class ? combining_class : -1;
      if (combining_class == 0) starter = codes.size();
      codes.push_back(code);
    }
    return codes;
  }

  std::unordered_map<char32_t, std::pair<char32_t, char32_t>> parts_;
  std::unordered_map<std::uint64_t, char32_t> composed_;
};

}  // namespace zamba::detail
