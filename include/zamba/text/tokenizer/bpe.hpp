// SPDX-License-Identifier: MIT
// Bpe: the model of a tokenizer.json, byte-pair encoding by ranked merges (Sennrich et al. 2016,
// arxiv.org/abs/1508.07909).
//
//   symbols of a word   one a character that is a token; with byte_fallback, one a byte of any other; else unk, or what
//                       stands for it
//   repeat              of the adjacent pairs that have a merge, the one of least rank, the leftmost of equals, becomes
//                       one symbol
//
// A heap holds the pairs that have a merge, and the symbols are a linked list, so a word of n characters takes
// O(n log n), whatever it consists of.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/io/json_part.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/text/unicode/utf8.hpp>

namespace zamba::detail {

inline constexpr Index largest_id = (1 << 20) - 1;
inline constexpr Token no_token = -1;
inline constexpr std::string_view space_mark = "\u2581";

struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using TokenIds = std::unordered_map<std::string, Token, TextHash, std::equal_to<>>;

/// "<0x0A>".
inline std::string byte_token(unsigned char byte) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  return {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
}

/// The merges by their pair of tokens: open addressing, at most half full.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t rank = 0;  // position in the file
    Token id = no_token;
  };

  explicit MergeTable(std::size_t merges = 0) {
    std::size_t size = 2;
    while (size < 2 * merges + 2) size *= 2;
    slots_.resize(size);
  }

  /// Of equal pairs the last one counts, as in the package `tokenizers`.
  void insert(Token left, Token right, Merge merge) { slots_[slot(key(left, right))] = {key(left, right), merge}; }

  /// The merge's id is no_token where there is none.
  Merge find(Token left, Token right) const { return slots_[slot(key(left, right))].merge; }

 private:
  struct Slot {
    std::uint64_t key = ~std::uint64_t{0};
    Merge merge;
  };

  static std::uint64_t key(Token left, Token right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }

  /// Of the key, or the empty one where it would be.
  std::size_t slot(std::uint64_t key) const {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = (key * 0x9e3779b97f4a7c15u) >> 32 & mask;
    while (slots_[at].key != key && slots_[at].merge.id != no_token) at = (at + 1) & mask;
    return at;
  }

  std::vector<Slot> slots_;
};

class Bpe {
 public:
  /// Working memory of encode, for one thread.
  struct Scratch {
    struct Symbol {
      Token id;
      std::int32_t previous, next;  // -1: none
    };
    std::vector<Symbol> symbols;
    std::vector<std::uint64_t> heap;  // rank, position: the least is the next merge
    bool refuse_unknown = false;      // nothing may stand for a character without a token
    std::string unknown = {};         // the first character that was left out, because nothing stands for it
  };

  Bpe() = default;
  /// The value of "model".
  explicit Bpe(const JsonPart& model);

  /// Appends the tokens of a word: of whatever no merge may reach beyond.
  void encode(std::string_view word, std::vector<Token>& to, Scratch& scratch) const;

  std::optional<Token> id(std::string_view text) const {
    const auto at = ids_.find(text);
    return at == ids_.end() ? std::nullopt : std::optional(at->second);
  }
  const TokenIds& ids() const { return ids_; }
  bool byte_fallback() const { return byte_fallback_; }
  /// Whether the tokens of these characters can stand for one without a token; where there is no unk, they do from now.
  bool replace_unknown_by(std::string_view text);
  std::optional<Token> unk() const { return unk_ == no_token ? std::nullopt : std::optional(unk_); }

 private:
  void read_merges(const JsonPart& merges);
  void read_symbols(std::string_view part, Scratch& scratch) const;
  void encode_part(std::string_view part, std::vector<Token>& to, Scratch& scratch) const;
  Token symbol(char32_t code) const;

  TokenIds ids_;
  std::array<Token, 128> ascii_{};               // tokens of one character
  std::unordered_map<char32_t, Token> symbols_;  // the same, of the others
  std::array<Token, 256> bytes_{};               // tokens of one byte, for byte_fallback
  MergeTable merges_;
  std::vector<Token> merged_;  // by rank
  Token unk_ = no_token;
  std::vector<Token> for_unknown_;  // the symbols that stand for a character without a token; unk, where there is one
  bool byte_fallback_ = false, fuse_unk_ = false, ignore_merges_ = false;
  bool parts_ = false;  // no merge joins a space mark to what is before it, unless that is one too
};

// ---- Reading ----

inline Bpe::Bpe(const JsonPart& model) {
  // Files of before `type` was written are BPE where they have merges.
  const std::string type = model["type"].text_or(model["merges"].is_null() ? "unknown" : "BPE");
  require(type == "BPE", model.place(), ": type ", quote(type), " is not supported, wanted 'BPE'");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    require(model[key].text_or("").empty(), model[key].place(), " is not supported, wanted none or an empty text");
  require(model["dropout"].is_null() || model["dropout"].value() == 0, model["dropout"].place(),
          " is not supported, wanted none: it makes encoding random");

  const JsonPart vocabulary = model["vocab"];
  std::vector<bool> used;
  for (const auto& [text, value] : vocabulary.object().items()) {
    const JsonPart part(value, vocabulary.place() + ": " + quote(text));
    const auto id = static_cast<std::size_t>(part.integer(largest_id));
    used.resize(std::max(used.size(), id + 1));
    require(!used[id], part.place(), ": id ", id, " is that of another token too");
    used[id] = true;
    ids_.emplace(text, static_cast<Token>(id));
  }

  ascii_.fill(no_token);
  for (const auto& [text, id] : ids_) {
    if (text.empty()) continue;
    const Character character = character_at(text, 0);
    if (character.size != text.size()) continue;
    if (character.code < 128)
      ascii_[character.code] = id;
    else
      symbols_.emplace(character.code, id);
  }

  byte_fallback_ = model["byte_fallback"].flag(false);
  if (byte_fallback_) {
    for (unsigned byte = 0; byte < 256; ++byte) {
      const std::string text = byte_token(static_cast<unsigned char>(byte));
      const auto found = id(text);
      require(found.has_value(), vocabulary.place(), ": byte_fallback wants a token for each byte, ", text,
              " is missing");
      bytes_[byte] = *found;
    }
  }
  if (const JsonPart unk = model["unk_token"]; !unk.is_null()) {
    const auto found = id(unk.text());
    require(found.has_value(), unk.place(), ": ", quote(unk.text()), " is not in the vocabulary");
    unk_ = *found;
    for_unknown_ = {unk_};
  }
  fuse_unk_ = model["fuse_unk"].flag(false) && unk_ != no_token;
  ignore_merges_ = model["ignore_merges"].flag(false);
  read_merges(model["merges"]);
}

inline bool Bpe::replace_unknown_by(std::string_view text) {
  if (unk_ != no_token) return true;
  for_unknown_.clear();
  for (std::size_t at = 0; at < text.size(); at += character_at(text, at).size)
    for_unknown_.push_back(symbol(character_at(text, at).code));
  if (std::find(for_unknown_.begin(), for_unknown_.end(), no_token) == for_unknown_.end()) return true;
  for_unknown_.clear();
  return false;
}

inline void Bpe::read_merges(const JsonPart& merges) {
  require(!merges.is_null(), merges.place(), ": wanted an array, came none");
  merges_ = MergeTable(merges.size());
  parts_ = id(space_mark).has_value();
  merges.each([&](const JsonPart& merge) {
    std::vector<std::string> pair;  // written as "a b" or as ["a", "b"]
    if (merge.is_text()) {
      const std::string& text = merge.text();
      const std::size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos) merge.refuse("two tokens and a space between");
      pair = {text.substr(0, space), text.substr(space + 1)};
    } else {
      merge.each([&](const JsonPart& side) { pair.push_back(side.text()); });
      if (pair.size() != 2) merge.refuse("an array of two tokens");
    }
    const auto known = [&](const std::string& text) {
      const auto found = id(text);
      require(found.has_value(), merge.place(), ": ", quote(text), " is not in the vocabulary");
      return *found;
    };
    const Token left = known(pair[0]), right = known(pair[1]);
    merged_.push_back(known(pair[0] + pair[1]));
    merges_.insert(left, right, {static_cast<std::uint32_t>(merged_.size() - 1), merged_.back()});
    if (pair[1].starts_with(space_mark) && !pair[0].ends_with(space_mark)) parts_ = false;
  });
}

// ---- Encoding ----

inline void Bpe::encode(std::string_view word, std::vector<Token>& to, Scratch& scratch) const {
  if (word.empty()) return;
  if (ignore_merges_) {
    if (const auto whole = id(word)) return to.push_back(*whole);
  }
  if (!parts_) return encode_part(word, to, scratch);
  // Parts that merges cannot join: encoded one by one they give the same tokens, out of a small heap.
  std::size_t begin = 0;
  for (std::size_t at = word.find(space_mark); at != word.npos; at = word.find(space_mark, at + space_mark.size())) {
    if (at == begin || word.substr(0, at).ends_with(space_mark)) continue;
    encode_part(word.substr(begin, at - begin), to, scratch);
    begin = at;
  }
  encode_part(word.substr(begin), to, scratch);
}

inline Token Bpe::symbol(char32_t code) const {
  if (code < 128) return ascii_[code];
  const auto at = symbols_.find(code);
  return at == symbols_.end() ? no_token : at->second;
}

inline void Bpe::read_symbols(std::string_view part, Scratch& scratch) const {
  require(part.size() <= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
          "Tokenizer: a word may have 2147483647 bytes, came ", part.size());
  auto& symbols = scratch.symbols;
  symbols.clear();
  bool after_unk = false;
  const auto add = [&](Token id) {
    const auto at = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  };
  for (std::size_t at = 0; at < part.size();) {
    const Character character = character_at(part, at);
    const Token id = symbol(character.code);
    if (id != no_token) {
      add(id);
    } else if (byte_fallback_) {
      for (const char byte : part.substr(at, character.size)) add(bytes_[static_cast<unsigned char>(byte)]);
    } else if (for_unknown_.empty() || scratch.refuse_unknown) {
      if (scratch.unknown.empty()) scratch.unknown = part.substr(at, character.size);
    } else if (!after_unk || !fuse_unk_) {
      for (const Token stands_for_it : for_unknown_) add(stands_for_it);
    }
    after_unk = id == no_token && !byte_fallback_;
    at += character.size;
  }
  if (!symbols.empty()) symbols.back().next = -1;
}

inline void Bpe::encode_part(std::string_view part, std::vector<Token>& to, Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  read_symbols(part, scratch);
  heap.clear();
  const auto at = [&symbols](std::int32_t position) -> Scratch::Symbol& {
    return symbols[static_cast<std::size_t>(position)];
  };
  /// Adds the pair that begins at a position, if it has a merge.
  const auto consider = [&](std::int32_t position) {
    if (position < 0 || at(position).next < 0) return false;
    const auto merge = merges_.find(at(position).id, at(at(position).next).id);
    if (merge.id == no_token) return false;
    heap.push_back(static_cast<std::uint64_t>(merge.rank) << 32 | static_cast<std::uint32_t>(position));
    return true;
  };
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(symbols.size()); ++i) consider(i);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  while (!heap.empty()) {
    const auto position = static_cast<std::int32_t>(heap.front() & 0xffffffff);
    const Token merged = merged_[heap.front() >> 32];
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    heap.pop_back();
    // Merges since then may have taken the pair, or made another of it.
    Scratch::Symbol& left = at(position);
    if (left.id == no_token || left.next < 0) continue;
    Scratch::Symbol& right = at(left.next);
    if (merges_.find(left.id, right.id).id != merged) continue;
    left.id = merged;
    left.next = right.next;
    right.id = no_token;
    if (left.next >= 0) at(left.next).previous = position;
    for (const std::int32_t changed : {left.previous, position})
      if (consider(changed)) std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  for (const auto& left : symbols)  // in their order still: a merge stays at its left symbol
    if (left.id != no_token) to.push_back(left.id);
}

}  // namespace zamba::detail
