// SPDX-License-Identifier: MIT
// AddedTokens: texts that are tokens wherever they stand, found before anything is merged. At every place the longest
// one counts.
//
// Their patterns are a tree of bytes, each read from its end, and every node has a link to the longest other one that
// its bytes end with (Aho and Corasick 1975, doi.org/10.1145/360825.360855). So one walk from the end of a text to its
// beginning meets the longest pattern that begins at each byte: O(n) for n bytes, whatever the patterns are.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/text/tokenizer/bpe.hpp>
#include <zamba/text/unicode/classes.hpp>
#include <zamba/text/unicode/utf8.hpp>

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
    std::uint32_t node = root;
    for (std::size_t at = pattern.size(); at-- > 0;) {
      std::uint32_t next = child(node, pattern[at]);
      if (next == root) next = new_child(node, pattern[at]);
      node = next;
    }
    if (nodes_[node].pattern != none) return;
    nodes_[node].pattern = static_cast<std::uint32_t>(patterns_.size());
    patterns_.push_back({token, pattern.size()});
  }

  /// Makes the links; once, after the last pattern.
  void link() {
    std::vector<std::uint32_t> nodes{root};  // by their depth
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      for (std::uint32_t at = nodes_[nodes[i]].child; at != root; at = nodes_[at].sibling) {
        Node& node = nodes_[at];
        if (nodes[i] != root) node.link = after(nodes_[nodes[i]].link, node.byte);
        if (node.pattern == none) node.pattern = nodes_[node.link].pattern;
        nodes.push_back(at);
      }
    }
  }

  /// Calls f(begin, part, id) with the parts of the text from left to right: id is that of an added token, or no_token
  /// for the text between. Special ones are text like any other unless `special`.
  /// White space that a token takes after it may hold the next token, which is met all the same unless it takes white
  /// space before it: parts may overlap, as in the package `tokenizers`.
  template <class F>
  void split(std::string_view text, bool special, F&& f) const {
    std::size_t done = 0, past = 0, spaces_end = 0;  // past: the end of the last match, whether it counted or not
    const auto matches = find(text);
    for (auto match = matches.rbegin(); match != matches.rend(); ++match) {
      std::size_t begin = match->begin;
      if (begin < past) continue;
      const auto& [token, size] = patterns_[match->pattern];
      std::size_t end = past = begin + size;
      if ((token.special && !special) || (token.single_word && in_word(text, begin, end))) continue;
      if (token.lstrip) {
        begin = std::max(begin, done);
        while (begin > done && is_space(character_before(text, begin).code))
          begin -= character_before(text, begin).size;
      }
      if (token.rstrip) {
        end = std::max(end, spaces_end);  // white space up to there, as an earlier token found
        while (end < text.size() && is_space(character_at(text, end).code)) end += character_at(text, end).size;
        spaces_end = end;
      }
      if (begin >= end) continue;  // white space that is taken already
      if (done < begin) f(done, text.substr(done, begin - done), no_token);
      f(begin, text.substr(begin, end - begin), token.id);
      done = end;
    }
    if (done < text.size()) f(done, text.substr(done), no_token);
  }

 private:
  static constexpr std::uint32_t root = 0, none = 0xffffffff;

  struct Node {
    std::uint32_t child = root, sibling = root;  // the first child, the next child of the same parent; root: none
    std::uint32_t link = root;
    std::uint32_t pattern = none;  // the longest that the node's bytes end with
    char byte = 0;
  };
  struct Pattern {
    AddedToken token;
    std::size_t size;
  };
  struct Match {
    std::size_t begin;
    std::uint32_t pattern;
  };

  /// The child of a node, or the root where there is none.
  std::uint32_t child(std::uint32_t node, char byte) const {
    if (node == root) return first_[static_cast<unsigned char>(byte)];
    std::uint32_t at = nodes_[node].child;
    while (at != root && nodes_[at].byte != byte) at = nodes_[at].sibling;
    return at;
  }

  std::uint32_t new_child(std::uint32_t node, char byte) {
    const auto at = static_cast<std::uint32_t>(nodes_.size());
    nodes_.push_back({.sibling = nodes_[node].child, .byte = byte});
    nodes_[node].child = at;
    if (node == root) first_[static_cast<unsigned char>(byte)] = at;
    return at;
  }

  /// The longest node that what was read ends with, when a byte comes behind a node.
  std::uint32_t after(std::uint32_t node, char byte) const {
    for (; node != root; node = nodes_[node].link)
      if (const std::uint32_t next = child(node, byte); next != root) return next;
    return first_[static_cast<unsigned char>(byte)];
  }

  /// The longest pattern at each place where one begins, from the last place to the first.
  std::vector<Match> find(std::string_view text) const {
    std::vector<Match> matches;
    if (patterns_.empty()) return matches;
    std::uint32_t node = root;
    for (std::size_t at = text.size(); at-- > 0;) {
      node = node == root ? first_[static_cast<unsigned char>(text[at])] : after(node, text[at]);
      if (node != root && nodes_[node].pattern != none) matches.push_back({at, nodes_[node].pattern});
    }
    return matches;
  }

  static bool in_word(std::string_view text, std::size_t begin, std::size_t end) {
    return (begin > 0 && is_of_word(character_before(text, begin).code)) ||
           (end < text.size() && is_of_word(character_at(text, end).code));
  }

  std::vector<Pattern> patterns_;
  std::vector<Node> nodes_{Node{}};         // the root first
  std::array<std::uint32_t, 256> first_{};  // the root's children
};

}  // namespace zamba::detail
