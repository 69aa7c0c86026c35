// SPDX-License-Identifier: MIT
// Text and tokens of a model's folder: its tokenizer.json, or, where there is none, a byte as a token.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <zamba/text/byte_tokenizer.hpp>
#include <zamba/text/text_stream.hpp>
#include <zamba/text/tokenizer.hpp>

namespace zamba_apps {

using zamba::Index;
using zamba::Token;

/// Bytes as TextStream takes a tokenizer.
struct Bytes {
  struct Place {};

  Place beginning() const { return {}; }
  void append(Token id, Place&, std::string& text, zamba::DecodeOptions = {}) const {
    if (id < zamba::ByteTokenizer::vocabulary()) text += static_cast<char>(id);  // beyond, tokens stand for nothing
  }
};

class Text {
 public:
  /// Bytes at or above the model's vocabulary are refused when they are met.
  Text(const std::filesystem::path& folder, Index vocabulary) : vocabulary_(vocabulary) {
    if (!zamba::is_there(folder / "tokenizer.json")) return;
    tokenizer_ = zamba::Tokenizer::load(folder);
    zamba::require(tokenizer_->vocabulary() <= vocabulary, "'", (folder / "tokenizer.json").string(), "' has ",
                   tokenizer_->vocabulary(), " tokens, the model a vocabulary of ", vocabulary);
  }

  bool of_bytes() const { return !tokenizer_; }

  /// The tokens of a text; where it begins a sequence, behind those that begin one.
  std::vector<Token> encode(std::string_view text, bool begins = false) const {
    if (tokenizer_) return tokenizer_->encode(text, {.add_special = begins, .find_special = begins});
    std::vector<Token> tokens = zamba::ByteTokenizer().encode(text);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      zamba::require(tokens[i] < vocabulary_, "byte ", i, " of the text is ", tokens[i],
                     ", outside the model's vocabulary of ", vocabulary_,
                     "; the folder has no tokenizer.json, so a byte is a token");
    return tokens;
  }

  std::string decode(std::span<const Token> tokens) const {
    Stream stream(*this);
    std::string text;
    for (const Token token : tokens) text += stream.push(token);
    return text + stream.finish();
  }

  /// Ids of the model that stand for nothing: above the tokenizer's, where the vocabulary is padded, or left out by it.
  std::vector<Token> without_text() const {
    std::vector<Token> ids;
    for (Token id = 0; id < vocabulary_; ++id)
      if (tokenizer_ ? !tokenizer_->has(id) : id >= zamba::ByteTokenizer::vocabulary()) ids.push_back(id);
    return ids;
  }

  std::optional<Token> begin() const { return tokenizer_ ? tokenizer_->bos() : std::nullopt; }
  /// The token that ends a text: for bytes, NUL, which occurs in none.
  std::optional<Token> end() const { return tokenizer_ ? tokenizer_->eos() : zamba::ByteTokenizer().document_end(); }

  /// Text as tokens come, behind a prompt: whole characters only.
  class Stream {
   public:
    explicit Stream(const Text& text) {
      if (text.tokenizer_)
        words_.emplace(*text.tokenizer_, zamba::TextStream<>::continues);
      else
        bytes_.emplace(text.bytes_, zamba::TextStream<Bytes>::continues);
    }
    std::string push(Token token) { return words_ ? words_->push(token) : bytes_->push(token); }
    std::string finish() { return words_ ? words_->finish() : bytes_->finish(); }

   private:
    std::optional<zamba::TextStream<>> words_;
    std::optional<zamba::TextStream<Bytes>> bytes_;
  };

 private:
  Index vocabulary_;
  Bytes bytes_;
  std::optional<zamba::Tokenizer> tokenizer_;
};

/// The whole of a file.
inline std::string read_text_file(const std::filesystem::path& path) {
  const zamba::MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace zamba_apps
