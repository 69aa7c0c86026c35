// SPDX-License-Identifier: MIT
// AddedTokens: texts that are tokens wherever they stand, found before anything is merged. At every place the longest
// one counts.
#pragma once

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <zamba/detail/byte_pairs.hpp>
#include <zamba/detail/unicode.hpp>
#include <zamba/detail/utf8.hpp>
#include <zamba/device.hpp>

namespace zamba::detail {

struct AddedToken {
  std::string content;
  Token id = no_token;
  bool special = false;      // has a meaning beyond its text: the beginning of a document, say
  bool single_word = false;  // only where no character of a word stands beside it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool normalized = false;   // looked for in the text as normalised
};

class AddedTokens {
 public:
  /// `pattern`: the content, normalised if that is how it is looked for. The first of equal patterns counts.
  void add(std::string_view pattern, const AddedToken& token) {
    if (pattern.empty()) return;
    std::uint32_t node = 0;
    for (const char byte : pattern) node = next_.try_emplace(edge(node, byte), ++nodes_).first->second;
    first_.set(static_cast<unsigned char>(pattern[0]));
    if (ends_.try_emplace(node, tokens_.size()).second) tokens_.push_back(token);
  }

  /// Calls f(begin, part, id) with the parts of the text from left to right: id is that of an added token, or no_token
  /// for the text between. Special ones are text like any other unless `special`.
  template <class F>
  void split(std::string_view text, bool special, F&& f) const {
    std::size_t done = 0;
    for (std::size_t at = 0; at < text.size();) {
      std::size_t size = 0;
      const AddedToken* token = first_[static_cast<unsigned char>(text[at])] ? longest_at(text, at, size) : nullptr;
      if (!token) {
        ++at;
        continue;
      }
      std::size_t begin = at, end = at + size;
      at = end;  // where it does not count, it is passed over all the same
      if ((token->special && !special) || (token->single_word && in_word(text, begin, end))) continue;
      if (token->lstrip)
        while (begin > done && is_space(character_before(text, begin).code))
          begin -= character_before(text, begin).size;
      if (token->rstrip)
        while (end < text.size() && is_space(character_at(text, end).code)) end += character_at(text, end).size;
      if (done < begin) f(done, text.substr(done, begin - done), no_token);
      f(begin, text.substr(begin, end - begin), token->id);
      at = done = end;
    }
    if (done < text.size()) f(done, text.substr(done), no_token);
  }

 private:
  static std::uint64_t edge(std::uint32_t node, char byte) {
    return std::uint64_t{node} << 8 | static_cast<unsigned char>(byte);
  }

  const AddedToken* longest_at(std::string_view text, std::size_t begin, std::size_t& size) const {
    const AddedToken* found = nullptr;
    std::uint32_t node = 0;
    for (std::size_t at = begin; at < text.size(); ++at) {
      const auto next = next_.find(edge(node, text[at]));
      if (next == next_.end()) break;
      node = next->second;
      if (const auto end = ends_.find(node); end != ends_.end()) {
        found = &tokens_[end->second];
        size = at + 1 - begin;
      }
    }
    return found;
  }

  static bool in_word(std::string_view text, std::size_t begin, std::size_t end) {
    return (begin > 0 && is_of_word(character_before(text, begin).code)) ||
           (end < text.size() && is_of_word(character_at(text, end).code));
  }

  std::vector<AddedToken> tokens_;
  std::bitset<256> first_;                                 // bytes that a pattern begins with
  std::unordered_map<std::uint64_t, std::uint32_t> next_;  // a tree of the patterns' bytes; 0 is its root
  std::unordered_map<std::uint32_t, std::size_t> ends_;    // nodes where a pattern ends, and its place in tokens_
  std::uint32_t nodes_ = 0;
};

}  // namespace zamba::detail
