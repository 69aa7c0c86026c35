// SPDX-License-Identifier: MIT
// GenerationOptions: how far generation goes and how it draws; and what is wrong with them or with prompts.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/generate/sampler.hpp>
#include <zamba/random.hpp>

namespace zamba {

struct GenerationOptions {
  SamplerOptions sampling{};
  Index max_new_tokens = 128;
  std::vector<Token> stop_tokens{};
  std::vector<Token> excluded_tokens{};  // never drawn: ids that a tokenizer has no text for, say
  Seed seed{};
  std::uint64_t stream = 0;  // of row 0
};

namespace detail {

/// The prompts as extend() takes them.
struct PackedPrompts {
  std::vector<Token> tokens;
  std::vector<Index> lengths;

  explicit PackedPrompts(std::span<const std::vector<Token>> prompts) {
    for (const std::vector<Token>& prompt : prompts) {
      tokens.insert(tokens.end(), prompt.begin(), prompt.end());
      lengths.push_back(static_cast<Index>(prompt.size()));
    }
  }
};

/// How many tokens a row gets room for before it has them: its end may be as far away as numbers go.
inline constexpr std::size_t most_reserved = 1 << 20;

template <class StateType>
void check_generation(const StateType& state, std::span<const std::vector<Token>> prompts, Index vocabulary,
                      const GenerationOptions& options) {
  const Index rows = static_cast<Index>(prompts.size());
  require(rows == state.batch(), "generate: ", rows, " prompts for a state of ", state.batch(), " rows");
  require(options.max_new_tokens >= 0, "GenerationOptions: max_new_tokens must be 0 or more, got ",
          options.max_new_tokens);
  check_tokens(options.stop_tokens, vocabulary, "GenerationOptions: stop token");
  check_excluded(options.excluded_tokens, vocabulary, "GenerationOptions: excluded token");
  for (Index row = 0; row < rows; ++row) {
    const std::vector<Token>& prompt = prompts[static_cast<std::size_t>(row)];
    const Index length = static_cast<Index>(prompt.size());
    require(length > 0, "generate: the prompt of row ", row, " is empty, at least one token is needed");
    require(state.length(row) + length <= state.max_length(), "generate: row ", row, " holds ", state.length(row),
            " positions, and its prompt of ", length, " would exceed max_length ", state.max_length());
    for (Index i = 0; i < length; ++i)
      require(prompt[static_cast<std::size_t>(i)] >= 0 && prompt[static_cast<std::size_t>(i)] < vocabulary,
              "generate: token ", prompt[static_cast<std::size_t>(i)], " at position ", i, " of row ", row,
              " is outside the vocabulary of ", vocabulary);
  }
}

}  // namespace detail

}  // namespace zamba
