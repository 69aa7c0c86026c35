// SPDX-License-Identifier: MIT
// TextStream: text out of tokens as they come, for a terminal or a client that reads along. A token may end within a
// character; its bytes are held back until the character is whole, or cannot become so any more.
//
//   zamba::TextStream text(tokenizer, zamba::TextStream<>::continues);
//   generate(model, state, prompt, options, [&](Index, Token token) { std::cout << text.push(token); return true; });
//   std::cout << text.finish();
//
// All that it returns, one after the other, is what decode gives for all the tokens.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include <zamba/device.hpp>
#include <zamba/text/tokenizer.hpp>
#include <zamba/text/unicode/utf8.hpp>

namespace zamba {

/// T: a Tokenizer, or any type with Place, beginning() and append() of the same meaning.
template <class T = Tokenizer>
class TextStream {
 public:
  /// Where the first token stands: at the beginning of a text, or behind a prompt, where its space is part of the text.
  enum Start { begins, continues };

  /// The tokenizer must outlive the stream.
  explicit TextStream(const T& tokenizer, Start start = begins, DecodeOptions options = {})
      : tokenizer_(&tokenizer),
        options_(options),
        place_(start == begins ? tokenizer.beginning() : typename T::Place()) {}

  /// What can be shown now, perhaps nothing.
  std::string push(Token token) {
    tokenizer_->append(token, place_, held_, options_);
    const std::size_t size = held_.size() - detail::incomplete_bytes(held_);
    std::string text = held_.substr(0, size);
    held_.erase(0, size);
    return text;
  }

  /// What was held back, after the last token: bytes that are no character.
  std::string finish() { return std::exchange(held_, {}); }

 private:
  const T* tokenizer_;
  DecodeOptions options_;
  typename T::Place place_;
  std::string held_;
};

}  // namespace zamba
