// SPDX-License-Identifier: MIT
// Characters that Unicode 15.0, 15.1 and 16.0 added, by UnicodeData.txt of each.
#include <zamba/text/unicode/classes.hpp>

#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <zamba/text/unicode/nfc.hpp>

namespace {

using namespace zamba::detail;

std::string text_of(const std::vector<char32_t>& codes) {
  std::string text;
  for (const char32_t code : codes) append_utf8(code, text);
  return text;
}

bool composes(const std::vector<char32_t>& codes, const std::vector<char32_t>& to) {
  return Nfc::of(text_of(codes)) == text_of(to);
}

}  // namespace

TEST_SUITE("text/unicode") {
  TEST_CASE("letters, numbers and characters of words of 15.0, 15.1 and 16.0") {
    for (const char32_t letter : {0x11f04, 0x1e030, 0x31350,  // Kawi, Cyrillic modifier, CJK extension H
                                  0x2ebf0, 0x2ee5d,           // CJK extension I
                                  0x1c89, 0xa7cb, 0xa7dc, 0x10d4a, 0x105c0, 0x16d40, 0x1e5d0, 0x11380, 0x13460})
      CHECK_MESSAGE((is_letter(letter) && is_of_word(letter) && !is_number(letter)), letter);
    for (const char32_t number : {0x11f50, 0x1d2c0, 0x10d40, 0x116d0, 0x16d70, 0x11bf0, 0x1ccf0, 0x1e5f1})
      CHECK_MESSAGE((is_number(number) && !is_letter(number)), number);
    CHECK(is_of_word(0x10d40));   // a digit
    CHECK(!is_of_word(0x1d2c0));  // a number that is none: Kaktovik zero
    for (const char32_t mark : {0x11f00, 0x10efd, 0x0897, 0x113ce, 0x1611e, 0x1e5ee})
      CHECK_MESSAGE((is_of_word(mark) && !is_letter(mark)), mark);
    // Symbols of these versions; beyond the last characters of blocks; what no version has given out.
    for (const char32_t none : {0x1fae8, 0x2ffc, 0x31e4, 0x1cc00, 0x1c8b, 0x10d66, 0x0378, 0xe0080})
      CHECK_MESSAGE((!is_letter(none) && !is_number(none) && !is_of_word(none)), none);
  }

  TEST_CASE("compositions of 16.0, which are of starters too") {
    CHECK(composes({0x105d2, 0x0307}, {0x105c9}));
    CHECK(composes({0x11382, 0x113c9}, {0x11383}));
    CHECK(composes({0x1611e, 0x1611e, 0x1611f}, {0x16126}));
    CHECK(composes({0x16d63, 0x16d67, 0x16d67}, {0x16d6a}));
    CHECK(composes({0x16126}, {0x16126}));
    // Marks of 16.0 in the order of their classes: U+1E5EF is below (220), U+0897 above (230).
    CHECK(composes({'a', 0x0897, 0x1e5ef}, {'a', 0x1e5ef, 0x0897}));
    CHECK(composes({'a', 0x1e5ef, 0x0301}, {0x00e1, 0x1e5ef}));
  }
}
