// SPDX-License-Identifier: MIT
// ByteTokenizer: every byte is a token, its value the id. No training, no files, and every text has an exact cost in
// bits per byte.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/error.hpp>

namespace zamba {

class ByteTokenizer {
 public:
  /// document_end: the byte that ends a document. NUL does not occur in text.
  explicit ByteTokenizer(Token document_end = 0) : document_end_(document_end) {
    require(document_end >= 0 && document_end < vocabulary(), "ByteTokenizer: the document end must be 0 to 255, got ",
            document_end);
  }

  static constexpr Index vocabulary() { return 256; }
  Token document_end() const { return document_end_; }

  /// Any bytes, one token each; nothing is added.
  std::vector<Token> encode(std::string_view text) const {
    std::vector<Token> tokens(text.size());
    for (std::size_t i = 0; i < text.size(); ++i) tokens[i] = static_cast<unsigned char>(text[i]);
    return tokens;
  }

  /// A document of its own: the text, which must not hold the end itself, and the end.
  std::vector<Token> encode_document(std::string_view text) const {
    const std::size_t at = text.find(static_cast<char>(document_end_));
    require(at == std::string_view::npos, "ByteTokenizer: byte ", at, " of the document is ", document_end_,
            ", which ends documents");
    std::vector<Token> tokens = encode(text);
    tokens.push_back(document_end_);
    return tokens;
  }

  /// The inverse of encode.
  std::string decode(std::span<const Token> tokens) const {
    std::string text(tokens.size(), '\0');
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      require(tokens[i] >= 0 && tokens[i] < vocabulary(), "ByteTokenizer: token ", i, " is ", tokens[i],
              ", not 0 to 255");
      text[i] = static_cast<char>(tokens[i]);
    }
    return text;
  }

 private:
  Token document_end_;
};

}  // namespace zamba
