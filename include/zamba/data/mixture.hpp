// SPDX-License-Identifier: MIT
// Mixture: packed training batches drawn from weighted token ranges; read_windows: held-out text in order.
//
// A row of a batch is a window of length + 1 tokens: a range is chosen by weight, and a start within it uniformly.
// The first `length` tokens are the input, the targets are the tokens that follow them. Documents are packed: at
// every document end a new sequence begins, so no state and no attention crosses it, and the end itself has no target
// (-1), for what follows it is another text.
// The batch depends on (seed, step, micro_batch) alone; there is no state to save: step s of a resumed run draws what
// step s of the first run drew. After the first batch of a size nothing is allocated.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <zamba/data/token_file.hpp>
#include <zamba/error.hpp>
#include <zamba/number.hpp>
#include <zamba/random.hpp>
#include <zamba/sequences.hpp>

namespace zamba {

/// The most tokens of a batch, and of all micro-batches of a step.
inline constexpr Index most_batch_tokens = Index{1} << 32;

/// Tokens to train on or to judge by, cut into sequences; used again for batch after batch.
struct PackedBatch {
  std::vector<Token> tokens;   // (tokens)
  std::vector<Token> targets;  // (tokens): the token that follows; -1 at a document end
  std::vector<Index> offsets;  // (sequences + 1), from 0 to the number of tokens
  Index longest = 0;           // tokens of the longest sequence

  Sequences sequences() const {
    return {offsets.data(), nullptr, static_cast<Index>(offsets.size()) - 1, static_cast<Index>(tokens.size()),
            longest};
  }

  /// Empty, with room for so many tokens, of which each may be a sequence.
  void clear(Index capacity) {
    tokens.clear();
    targets.clear();
    offsets.assign(1, 0);
    longest = 0;
    tokens.reserve(static_cast<std::size_t>(capacity));
    targets.reserve(static_cast<std::size_t>(capacity));
    offsets.reserve(static_cast<std::size_t>(capacity) + 1);
  }

  /// A row: the `count` tokens from `first` on as input, the one behind them as the last target.
  void append(const TokenFile& file, Index first, Index count) {
    const Token end = file.document_end().value_or(-1);
    for (Index i = 0; i < count; ++i) {
      const Token token = file[first + i];
      tokens.push_back(token);
      targets.push_back(token == end ? -1 : file[first + i + 1]);
      if (token == end || i + 1 == count) {
        const auto at = static_cast<Index>(tokens.size());
        longest = std::max(longest, at - offsets.back());
        offsets.push_back(at);
      }
    }
  }
};

/// One ingredient. Its weight is the share of rows drawn from it, relative to the other weights.
struct MixtureSource {
  TokenRange range;
  double weight = 1;
  std::string name;
};

class Mixture {
 public:
  explicit Mixture(std::vector<MixtureSource> sources) : sources_(std::move(sources)) {
    require(!sources_.empty(), "Mixture: there is no source");
    double total = 0;
    for (const MixtureSource& source : sources_) {
      source.range.check();
      require(is_finite(source.weight) && source.weight > 0, "Mixture: the weight of '", source.name,
              "' must be above 0, got ", source.weight, "; leave a source of weight 0 out");
      total += source.weight;
      cumulative_.push_back(total);
    }
    require(is_finite(total), "Mixture: the weights add up to ", total);
    for (const MixtureSource& source : sources_)  // the draws are multiples of 2^-53
      require(source.weight / total >= 0x1p-53, "Mixture: the weight of '", source.name, "', ", source.weight, " of ",
              total, " in all, is too small for anything to be drawn from it");
  }

  const std::vector<MixtureSource>& sources() const { return sources_; }

  /// Throws unless every source holds a window of `length` tokens and the one that follows.
  void check(Index length) const {
    require(length > 0, "Mixture: a row has at least one token, got a length of ", length);
    for (const MixtureSource& source : sources_)
      require(source.range.size() > length, "Mixture: '", source.name, "' has ", source.range.size(),
              " tokens; rows of ", length, " need ", length + 1);
  }

  /// Fills `batch` with `rows` rows of `length` tokens.
  void draw(Seed seed, Index step, Index micro_batch, Index rows, Index length, PackedBatch& batch) const {
    require(step >= 0 && micro_batch >= 0, "Mixture: step and micro-batch count from 0, got ", step, " and ",
            micro_batch);
    require(rows > 0, "Mixture: a batch has at least one row, got ", rows);
    check(length);
    require(rows <= most_batch_tokens / length, "Mixture: ", rows, " rows of ", length,
            " tokens are wanted; a batch has at most ", most_batch_tokens, " tokens");
    Random of_step(seed, static_cast<std::uint64_t>(step));
    Random random(Seed{of_step.bits()}, static_cast<std::uint64_t>(micro_batch));
    batch.clear(rows * length);
    for (Index row = 0; row < rows; ++row) {
      const double at = random.uniform() * cumulative_.back();
      const auto found = std::upper_bound(cumulative_.begin(), cumulative_.end() - 1, at) - cumulative_.begin();
      const TokenRange& range = sources_[static_cast<std::size_t>(found)].range;
      batch.append(*range.file, range.first + random.below(range.size() - length), length);
    }
  }

  /// Names, weights and ranges: equal where two mixtures over the same files draw the same.
  std::string str() const {
    std::ostringstream text;
    text.precision(17);
    for (const MixtureSource& source : sources_)
      text << (&source == sources_.data() ? "" : ", ") << source.name << " " << source.weight << " ["
           << source.range.first << ", " << source.range.last << ")";
    return text.str();
  }

 private:
  std::vector<MixtureSource> sources_;
  std::vector<double> cumulative_;  // sums of the weights up to and with each source
};

/// The windows of `length` tokens, one after the other, that cover a range: all of its tokens but the first are a
/// target once, or follow a document end. The last window may be shorter.
inline Index window_count(const TokenRange& range, Index length) {
  range.check();
  require(length > 0, "window_count: a window has at least one token, got ", length);
  return range.size() < 2 ? 0 : (range.size() - 2) / length + 1;
}

/// Fills `batch` with windows [window, window + rows) of a range, or as many as there are.
inline void read_windows(const TokenRange& range, Index length, Index window, Index rows, PackedBatch& batch) {
  const Index count = window_count(range, length);
  require(rows > 0 && window >= 0 && window < count, "read_windows: ", rows, " windows from ", window, " wanted of ",
          count);
  const Index last = window + std::min(rows, count - window), tokens = range.size() - 1 - window * length;
  batch.clear(last < count ? (last - window) * length : tokens);
  for (Index w = window; w < last; ++w) {
    const Index first = range.first + w * length;
    batch.append(*range.file, first, std::min(length, range.last - 1 - first));
  }
}

}  // namespace zamba
