// SPDX-License-Identifier: MIT
// Decoder: the decoder of a tokenizer.json. What a token stands for follows from the token alone, but for the
// beginning of a text, so texts are looked up, and one token after the other can be decoded.
//
//   Replace, ByteFallback, Fuse, Strip   "▁the" -> " the", "<0x0A>" -> one byte; together; spaces off the front
//   Metaspace                            "▁the" -> " the", but "the" as the first token
//   ByteLevel                            "Ġthe" -> " the", by characters that stand for bytes
//
// Bytes that are not UTF-8 are kept; the package `tokenizers` puts U+FFFD in their place.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/io/json_part.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/text/tokenizer/bpe.hpp>
#include <zamba/text/tokenizer/byte_level.hpp>
#include <zamba/text/tokenizer/normalizer.hpp>

namespace zamba::detail {

/// Whether a text is that of a byte, "<0x0A>", and which.
inline bool read_byte_token(std::string_view text, unsigned& byte) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return false;
  const auto [end, error] = std::from_chars(text.data() + 3, text.data() + 5, byte, 16);
  return error == std::errc() && end == text.data() + 5;
}

class Decoder {
 public:
  /// Where in a text the next token stands.
  struct Place {
    bool first = false;     // it is the first token
    std::size_t strip = 0;  // so many leading characters of the text are still to be left out
  };

  Decoder() = default;
  /// The value of "decoder".
  explicit Decoder(const JsonPart& part) : place_(part.place()) {
    if (part.is_null()) separator_ = " ";  // tokens are words
    read(part);
    require(kinds_.size() <= most_steps, place_, ": at most ", most_steps, " steps are supported, came ",
            kinds_.size());
    const auto count = [&](Kind kind) { return std::count(kinds_.begin(), kinds_.end(), kind); };
    const auto begins_with = [&](Kind a, Kind b) {
      const auto at = std::find(kinds_.begin(), kinds_.end(), b);
      return at == kinds_.end() || std::find(kinds_.begin(), at, a) != at;
    };
    // Replace sees tokens, Strip the text that Fuse makes; ByteLevel and Metaspace make the text alone.
    const bool alone = count(byte_level) + count(metaspace) == 0 || kinds_.size() == 1;
    const bool once = count(byte_fallback) <= 1 && count(strip) <= 1;
    const bool in_order = begins_with(fuse, strip) && (kinds_.empty() || std::is_sorted(kinds_.begin(), kinds_.end()));
    require(alone && once && in_order, part.place(),
            ": this order of decoders is not supported, wanted ByteLevel, Metaspace, or any of Replace, ByteFallback, "
            "Fuse and, after it, Strip");
  }

  Place beginning() const { return {true, strip_}; }

  /// What a token stands for. `literal`: it stands for its own text in bytes, whatever ByteLevel makes of others.
  std::string text_of(std::string_view token, bool literal) const {
    std::string text(token);
    const Growth growth{place_, token.size()};
    for (const auto& [from, to] : replacements_)
      text = replace_all(text, from, to, [&](std::size_t size) { growth.check(size); });
    if (has(byte_level) && !literal) return ByteAlphabet::get().read(text);
    if (has(metaspace)) return replace_all(text, mark_, " ");
    unsigned byte = 0;
    if (has(byte_fallback) && read_byte_token(text, byte)) return std::string(1, static_cast<char>(byte));
    return text;
  }

  /// Appends the text of a token at its place. `token`: as it is written in the vocabulary; `text`: text_of it.
  void append(std::string_view token, std::string_view text, Place& place, std::string& to) const {
    if (!std::exchange(place.first, false)) {
      to += separator_;
    } else if (first_without_marks_) {
      to += replace_all(token, mark_, "");
      return;
    }
    for (; place.strip > 0 && !text.empty(); --place.strip) {
      if (!text.starts_with(stripped_)) {
        place.strip = 0;
        break;
      }
      text.remove_prefix(stripped_.size());
    }
    to += text;
  }

 private:
  enum Kind { replace, byte_fallback, fuse, strip, byte_level, metaspace };

  bool has(Kind kind) const { return std::find(kinds_.begin(), kinds_.end(), kind) != kinds_.end(); }

  void read(const JsonPart& part) {
    if (part.is_null()) return;
    const std::string& type = part["type"].text();
    if (type == "Sequence") return part["decoders"].each([&](const JsonPart& step) { read(step); });
    if (type == "Replace") {
      kinds_.push_back(replace);
      replacements_.push_back(read_replace(part));
    } else if (type == "ByteFallback") {
      kinds_.push_back(byte_fallback);
    } else if (type == "Fuse") {
      kinds_.push_back(fuse);
    } else if (type == "Strip") {
      kinds_.push_back(strip);
      strip_ = static_cast<std::size_t>(part["start"].integer(largest_id));
      stripped_ = part["content"].text();
      if (stripped_.empty()) part["content"].refuse("a character");
      if (part["stop"].integer(largest_id) != 0) part["stop"].refuse("0; to strip the end is not supported");
    } else if (type == "ByteLevel") {
      kinds_.push_back(byte_level);
    } else if (type == "Metaspace") {
      kinds_.push_back(metaspace);
      mark_ = part["replacement"].text();
      if (mark_.empty()) part["replacement"].refuse("a character");
      first_without_marks_ =
          part["prepend_scheme"].text_or(part["add_prefix_space"].flag(true) ? "always" : "never") != "never";
    } else {
      fail(part.place(), ": type ", quote(type),
           " is not supported, wanted Replace, ByteFallback, Fuse, Strip, ByteLevel, Metaspace or Sequence");
    }
  }

  std::string place_;
  std::vector<Kind> kinds_;  // in the order of the file
  std::vector<std::pair<std::string, std::string>> replacements_;
  std::size_t strip_ = 0;
  std::string stripped_, mark_, separator_;
  bool first_without_marks_ = false;  // of Metaspace: the first token loses all of its marks
};

}  // namespace zamba::detail
