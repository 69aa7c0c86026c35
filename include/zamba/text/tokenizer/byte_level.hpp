// SPDX-License-Identifier: MIT
// Byte-level tokens, as of GPT-2: a text is split into words, and each byte of a word is written as one printable
// character, so that tokens are texts and every byte has one.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include <zamba/text/unicode/classes.hpp>
#include <zamba/text/unicode/utf8.hpp>

namespace zamba::detail {

/// The character of each byte: itself where Latin-1 prints it, otherwise the next one from U+0100 on.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    bytes_.fill(-1);
    char32_t next = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool prints = (byte > ' ' && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
      const char32_t code = prints ? byte : next++;
      append_utf8(code, characters_[byte]);
      bytes_[code] = static_cast<int>(byte);
    }
  }

  static const ByteAlphabet& get() {
    static const ByteAlphabet alphabet;
    return alphabet;
  }

  std::string write(std::string_view bytes) const {
    std::string text;
    for (const char byte : bytes) text += characters_[static_cast<unsigned char>(byte)];
    return text;
  }

  /// The inverse; a text of other characters stands for itself.
  std::string read(std::string_view text) const {
    std::string bytes;
    for (std::size_t at = 0; at < text.size();) {
      const Character character = character_at(text, at);
      if (character.code >= bytes_.size() || bytes_[character.code] < 0) return std::string(text);
      bytes.push_back(static_cast<char>(bytes_[character.code]));
      at += character.size;
    }
    return bytes;
  }

 private:
  std::array<std::string, 256> characters_;
  std::array<int, 0x144> bytes_{};  // by character; -1: none
};

/// The end of the word that begins at text[begin]: the first alternative that matches of
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// Bytes that are not UTF-8 count as neither space, letter nor number.
inline std::size_t end_of_word(std::string_view text, std::size_t begin) {
  enum Kind { letter, number, space, other };
  const auto kind_of = [](char32_t code) {
    return is_letter(code) ? letter : is_space(code) ? space : is_number(code) ? number : other;
  };
  if (text[begin] == '\'') {
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
      if (text.substr(begin).starts_with(ending)) return begin + ending.size();
  }
  std::size_t at = begin, last = begin;  // `last` begins the last character of the run
  Character character = character_at(text, at);
  Kind kind = kind_of(character.code);
  if (text[begin] == ' ' && begin + 1 < text.size()) {
    character = character_at(text, begin + 1);
    if (const Kind next = kind_of(character.code); next != space) {
      kind = next;
      at = begin + 1;
    }
  }
  for (; at < text.size(); at += character_at(text, at).size) {
    if (kind_of(character_at(text, at).code) != kind) break;
    last = at;
  }
  // White space leaves its last character to the word that follows, if there are two or more.
  return kind == space && at < text.size() && last > begin ? last : at;
}

}  // namespace zamba::detail
