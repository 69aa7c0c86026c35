// SPDX-License-Identifier: MIT
// Packed documents to train on.
#pragma once

#include <span>
#include <vector>

#include <zamba/model.hpp>

#include "nets.hpp"

namespace zamba_test {

/// Documents of random tokens, one in five of which has no target.
struct Documents {
  std::vector<Token> tokens, targets;
  std::vector<Index> offsets{0};

  explicit Documents(const std::vector<Index>& lengths) {
    for (const Index length : lengths) offsets.push_back(offsets.back() + length);
    tokens = random_tokens(offsets.back(), 1);
    targets = random_tokens(offsets.back(), 2);
    for (std::size_t i = 3; i < targets.size(); i += 5) targets[i] = -1;
  }
  operator TrainingBatch() const { return {tokens, targets, offsets}; }
  /// Tokens [first, first + count) as one document.
  TrainingBatch part(Index first, Index count) const {
    static thread_local std::vector<Index> bounds;
    bounds = {0, count};
    const auto at = static_cast<std::size_t>(first), size = static_cast<std::size_t>(count);
    return {std::span(tokens).subspan(at, size), std::span(targets).subspan(at, size), bounds};
  }
};

}  // namespace zamba_test
