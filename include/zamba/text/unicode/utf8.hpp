// SPDX-License-Identifier: MIT
// UTF-8, strictly: no overlong forms, no surrogates, nothing above U+10FFFF. Bytes that are not UTF-8 are kept: each is
// a character of its own without a code.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace zamba::detail {

inline constexpr char32_t no_code = 0xffffffff;

struct Character {
  char32_t code = no_code;
  std::size_t size = 1;  // in bytes
};

/// What a first byte and the second one promise: the size in bytes, and which second bytes may follow; size 1 also for
/// a byte that begins nothing.
struct FirstByte {
  std::size_t size = 1;
  unsigned lowest = 0x80, highest = 0xbf;  // of the second byte; excludes overlong forms and surrogates
};

inline FirstByte first_byte(unsigned char byte) {
  if (byte < 0xc2 || byte > 0xf4) return {};
  if (byte < 0xe0) return {2};
  if (byte < 0xf0) return {3, byte == 0xe0 ? 0xa0u : 0x80u, byte == 0xed ? 0x9fu : 0xbfu};
  return {4, byte == 0xf0 ? 0x90u : 0x80u, byte == 0xf4 ? 0x8fu : 0xbfu};
}

/// How many of the `size` bytes of the character that begins at text[at] are there and right.
inline std::size_t matching_bytes(std::string_view text, std::size_t at, const FirstByte& first) {
  std::size_t count = 1;
  for (; count < first.size && at + count < text.size(); ++count) {
    const unsigned byte = static_cast<unsigned char>(text[at + count]);
    if (byte < (count == 1 ? first.lowest : 0x80u) || byte > (count == 1 ? first.highest : 0xbfu)) break;
  }
  return count;
}

/// The character that begins at text[at].
inline Character character_at(std::string_view text, std::size_t at) {
  const auto byte = static_cast<unsigned char>(text[at]);
  if (byte < 0x80) return {byte, 1};
  const FirstByte first = first_byte(byte);
  if (first.size == 1 || matching_bytes(text, at, first) < first.size) return {};
  char32_t code = byte & (0x7fu >> first.size);
  for (std::size_t i = 1; i < first.size; ++i) code = code << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3fu);
  return {code, first.size};
}

/// The character that ends before text[end].
inline Character character_before(std::string_view text, std::size_t end) {
  for (std::size_t size = 1; size <= 4 && size <= end; ++size) {
    const Character found = character_at(text.substr(0, end), end - size);
    if (found.code != no_code && found.size == size) return found;
  }
  return {};
}

/// How many bytes at the end are the beginning of a character that further bytes could complete.
inline std::size_t incomplete_bytes(std::string_view text) {
  for (std::size_t size = 1; size <= 3 && size <= text.size(); ++size) {
    const FirstByte first = first_byte(static_cast<unsigned char>(text[text.size() - size]));
    if (first.size > size && matching_bytes(text, text.size() - size, first) == size) return size;
  }
  return 0;
}

inline void append_utf8(char32_t code, std::string& to) {
  const auto put = [&](char32_t byte) { to.push_back(static_cast<char>(byte)); };
  const auto rest = [&](int shift) { put(0x80 | (code >> shift & 0x3f)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xc0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    rest(6);
  } else {
    put(0xf0 | code >> 18);
    rest(12);
    rest(6);
  }
  rest(0);
}

}  // namespace zamba::detail
