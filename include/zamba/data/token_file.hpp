// SPDX-License-Identifier: MIT
// TokenFile: a memory-mapped file of token ids, and TokenRange, a part of one.
//
// The format is the field's `.bin`: nothing but ids, 16 or 32 bits each, unsigned, little-endian. Documents follow each
// other; where a token marks the end of one, that token belongs to the document it ends.
//
// Nothing in such a file says its width. Read as 16 bits, a file of 32-bit ids has the upper halves, next to nothing,
// at every second place: open() refuses a file that is so from end to end, or for its first two million ids. Read as 32
// bits, one of 16-bit ids has ids outside any vocabulary.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/io/file.hpp>

namespace zamba {

/// How many bytes an id takes in the file.
enum class TokenWidth : int { u16 = 2, u32 = 4 };

class TokenFile {
 public:
  static TokenFile open(const std::filesystem::path& path, TokenWidth width,
                        std::optional<Token> document_end = std::nullopt) {
    return TokenFile(path, width, document_end);
  }

  /// The number of tokens.
  Index size() const { return static_cast<Index>(file_.bytes().size()) / static_cast<Index>(width_); }
  std::optional<Token> document_end() const { return document_end_; }
  const std::filesystem::path& path() const { return path_; }

  /// The token at position i, 0 <= i < size(), unchecked. An id above 2^31 - 1 comes out negative.
  Token operator[](Index i) const { return static_cast<Token>(id(i)); }

  /// Copies tokens [first, first + to.size()).
  void copy(Index first, std::span<Token> to) const {
    const auto count = static_cast<Index>(to.size());
    require(first >= 0 && first <= size() && count <= size() - first, "TokenFile '", path_.string(), "': wanted ",
            count, " tokens from position ", first, " on, of ", size());
    for (Index i = 0; i < count; ++i) to[static_cast<std::size_t>(i)] = (*this)[first + i];
  }

  /// Throws where an id of [first, last), or of the whole file, is not below `vocabulary`, naming the first.
  void check_vocabulary(Index vocabulary) const { check_vocabulary(vocabulary, 0, size()); }
  void check_vocabulary(Index vocabulary, Index first, Index last) const {
    constexpr Index block = 1 << 12;
    for (Index at = first; at < last; at += block) {
      const Index end = std::min(at + block, last);
      if (largest(at, end) < vocabulary) continue;
      while (at < end && id(at) < vocabulary) ++at;
      fail("TokenFile '", path_.string(), "': token ", at, " is ", id(at), ", outside a vocabulary of ", vocabulary,
           "; wrong width or wrong tokenizer?");
    }
  }

 private:
  TokenFile(const std::filesystem::path& path, TokenWidth width, std::optional<Token> document_end)
      : file_(path), path_(path), width_(width), document_end_(document_end) {
    require(file_.bytes().size() % static_cast<std::size_t>(width) == 0, "TokenFile '", path.string(),
            "': ", file_.bytes().size(), " bytes are not a whole number of ", 8 * static_cast<int>(width),
            "-bit tokens");
    require(!document_end || *document_end >= 0, "TokenFile '", path.string(),
            "': the document end must be a token id, got ", document_end.value_or(0));
    require(width == TokenWidth::u32 || document_end.value_or(0) <= 0xffff, "TokenFile '", path.string(),
            "': the document end is ", document_end.value_or(0), ", which 16 bits cannot hold");
    require(width == TokenWidth::u32 || !is_of_32_bits(), "TokenFile '", path.string(), "': opened as 16-bit tokens, ",
            "every second one is nearly 0, as where the tokens are of 32 bits; TokenWidth::u32?");
  }

  /// Whether each pair of 16-bit ids is as that of a 32-bit one: a second id of 0, or below 16 (a vocabulary of a
  /// million) beside first ones that are not. A text that is so by chance has few tokens. The search ends at the first
  /// pair that is not.
  bool is_of_32_bits() const {
    constexpr Index fewest_pairs = 16, most_ids = 1 << 21, upper_halves = 16;
    if (size() % 2 != 0 || size() / 2 < fewest_pairs) return false;
    Index first_ids = 0, second_ids = 0;
    for (Index i = 0; i < std::min(size(), most_ids) && second_ids < upper_halves; i += 2) {
      first_ids = std::max(first_ids, id(i));
      second_ids = std::max(second_ids, id(i + 1));
    }
    return (second_ids == 0 && first_ids > 0) || (second_ids < upper_halves && first_ids >= upper_halves);
  }

  Index largest(Index first, Index last) const {
    return width_ == TokenWidth::u16 ? largest<std::uint16_t>(first, last) : largest<std::uint32_t>(first, last);
  }
  template <class Id>
  Index largest(Index first, Index last) const {
    static_assert(std::endian::native == std::endian::little);
    const std::byte* const from = file_.bytes().data();
    const auto at = [from](Index i) __attribute__((always_inline)) {
      Id id;
      std::memcpy(&id, from + i * static_cast<Index>(sizeof(Id)), sizeof(Id));
      return id;
    };
    constexpr Index block = 128;  // a loop of constant length is one that compilers vectorise at -O2
    Id most[block] = {}, result = 0;
    Index i = first;
    for (; i + block <= last; i += block)
      for (Index k = 0; k < block; ++k) most[k] = std::max(most[k], at(i + k));
    for (; i < last; ++i) result = std::max(result, at(i));
    for (const Id id : most) result = std::max(result, id);
    return static_cast<Index>(result);
  }

  Index id(Index i) const {
    const std::byte* at = file_.bytes().data() + i * static_cast<Index>(width_);
    const auto byte = [at](int k) { return static_cast<Index>(at[k]) << (8 * k); };
    return width_ == TokenWidth::u16 ? byte(0) | byte(1) : byte(0) | byte(1) | byte(2) | byte(3);
  }

  MappedFile file_;
  std::filesystem::path path_;
  TokenWidth width_;
  std::optional<Token> document_end_;
};

/// Writes ids as TokenFile reads them; the file is replaced whole or not at all.
inline void write_token_file(const std::filesystem::path& path, std::span<const Token> tokens, TokenWidth width) {
  const Index most =
      width == TokenWidth::u16 ? std::numeric_limits<std::uint16_t>::max() : std::numeric_limits<Token>::max();
  replace_file(path, [&](FileWriter& out) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      require(tokens[i] >= 0 && tokens[i] <= most, "token ", i, " is ", tokens[i], ", and ",
              8 * static_cast<int>(width), " bits hold 0 to ", most);
      std::array<std::byte, 4> bytes;
      for (int k = 0; k < 4; ++k) bytes[static_cast<std::size_t>(k)] = static_cast<std::byte>(tokens[i] >> (8 * k));
      out.write(std::span(bytes).first(static_cast<std::size_t>(width)));
    }
  });
}

/// Tokens [first, last) of a file, which must outlive the range.
struct TokenRange {
  const TokenFile* file = nullptr;
  Index first = 0, last = 0;

  static TokenRange whole(const TokenFile& file) { return {&file, 0, file.size()}; }

  Index size() const { return last - first; }

  /// Throws unless this is a part of a file.
  void check() const {
    require(file != nullptr, "TokenRange: there is no file");
    require(0 <= first && first <= last && last <= file->size(), "TokenRange: [", first, ", ", last,
            ") is no part of the ", file->size(), " tokens of '", file->path().string(), "'");
  }

  /// Whether any token of the range predicts one: all but the last do, and document ends do not.
  bool has_target() const {
    const Token end = file->document_end().value_or(-1);
    Index at = first;
    while (at < last - 1 && (*file)[at] == end) ++at;
    return at < last - 1;
  }
};

/// TokenFile::check_vocabulary for the parts of files that ranges cover, each part once.
inline void check_vocabulary(std::vector<TokenRange> ranges, Index vocabulary) {
  std::sort(ranges.begin(), ranges.end(), [](const TokenRange& a, const TokenRange& b) {
    return a.file != b.file ? std::less<const TokenFile*>()(a.file, b.file) : a.first < b.first;
  });
  const TokenFile* file = nullptr;
  Index seen = 0;
  for (const TokenRange& range : ranges) {
    if (range.file != file) seen = 0;
    file = range.file;
    file->check_vocabulary(vocabulary, std::max(range.first, seen), range.last);
    seen = std::max(seen, range.last);
  }
}

/// A file in two: what is trained on, and what it is judged by.
struct TrainHeldOut {
  TokenRange train, held_out;
};

/// The last `held_out` tokens (a share of the range) are held out. The cut moves on to the next document boundary, so
/// that no document is on both sides; where that would take more than half of the held-out part, it stays.
inline TrainHeldOut split(TokenRange range, double held_out) {
  range.check();
  require(held_out > 0 && held_out < 1, "split: the held-out share must be between 0 and 1, got ", held_out);
  const Index wanted = static_cast<Index>(static_cast<double>(range.size()) * held_out);
  require(wanted > 0 && wanted < range.size(), "split: ", held_out, " of ", range.size(),
          " tokens leaves one side empty");
  const Index cut = range.last - wanted;
  TrainHeldOut result{{range.file, range.first, cut}, {range.file, cut, range.last}};
  if (const auto end = range.file->document_end()) {
    for (Index at = cut; at <= cut + wanted / 2 && at < range.last; ++at) {
      if ((*range.file)[at - 1] != *end) continue;
      result.train.last = result.held_out.first = at;
      break;
    }
  }
  return result;
}

}  // namespace zamba
