// SPDX-License-Identifier: MIT
// What tokenizers ask of characters: letters, numbers, white space, characters of words.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>

#include <zamba/text/unicode/classes_table.hpp>
#include <zamba/text/unicode/utf8.hpp>

namespace zamba::detail {

/// Whether one of the ranges, which are in order, holds the code.
template <std::size_t Count>
bool holds(const CodeRange (&ranges)[Count], char32_t code) {
  const auto* after = std::upper_bound(std::begin(ranges), std::end(ranges), code,
                                       [](char32_t wanted, const CodeRange& range) { return wanted < range.first; });
  return after != std::begin(ranges) && code <= std::prev(after)->last;
}

/// The property White_Space.
inline bool is_space(char32_t code) {
  if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
  return code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
         code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

inline bool is_letter(char32_t code) {
  if (code < 0x80) return (code | 0x20) >= 'a' && (code | 0x20) <= 'z';
  return holds(letters, code);
}

inline bool is_number(char32_t code) {
  if (code < 0x80) return code >= '0' && code <= '9';
  return holds(numbers, code);
}

/// What \w of a regular expression means.
inline bool is_of_word(char32_t code) {
  if (code < 0x80) return code == '_' || is_letter(code) || is_number(code);
  return holds(letters, code) || holds(numbers_of_words, code) || holds(others_of_words, code);
}

}  // namespace zamba::detail
