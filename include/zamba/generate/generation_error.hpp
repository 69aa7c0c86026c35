// SPDX-License-Identifier: MIT
// GenerationError: some rows of a batch got no token. The others have run to their ends, and nothing of theirs is lost.
//
//   try {
//     output = generate(model, state, prompts, options);
//   } catch (const zamba::GenerationError& error) {
//     output = error.tokens();  // those of error.rows() end early
//   }
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/error.hpp>

namespace zamba {

class GenerationError : public Error {
 public:
  GenerationError(const std::string& message, std::vector<std::vector<Token>> tokens, std::vector<Index> rows)
      : Error(message), tokens_(std::move(tokens)), rows_(std::move(rows)) {}

  /// The new tokens of every row, as they would have been returned.
  const std::vector<std::vector<Token>>& tokens() const { return tokens_; }
  /// The rows that got no further token: a logit was NaN, or none was above -inf.
  const std::vector<Index>& rows() const { return rows_; }

 private:
  std::vector<std::vector<Token>> tokens_;
  std::vector<Index> rows_;
};

namespace detail {

/// Why a draw gave no token.
class NoToken : public Error {
 public:
  using Error::Error;
};

/// The rows that got no token, and why.
class FailedRows {
 public:
  /// `count`: the new tokens that the row got before.
  void add(Index row, std::size_t count, const NoToken& why) {
    constexpr std::size_t listed = 10;
    rows_.push_back(row);
    if (rows_.size() > listed) return;
    text_ += (text_.empty() ? "" : "; ") + std::string("row ") + std::to_string(row) + ", after " +
             std::to_string(count) + " new tokens: " + (why.what() + std::string_view("zamba: ").size());
  }

  /// Throws where there are any; `tokens`: those of all rows.
  void check(const char* where, const std::vector<std::vector<Token>>& tokens) const {
    if (rows_.empty()) return;
    throw GenerationError(std::string("zamba: ") + where + ": " + std::to_string(rows_.size()) + " of " +
                              std::to_string(tokens.size()) + " rows ended early: " + text_,
                          tokens, rows_);
  }

 private:
  std::vector<Index> rows_;
  std::string text_;  // of the first ones
};

}  // namespace detail

}  // namespace zamba
