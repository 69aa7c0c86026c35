// SPDX-License-Identifier: MIT
// Sampler: the next token from the logits of the last position.
//
// Excluded tokens are never drawn: their logits are taken for -inf, whatever they are. Otherwise the steps and their
// order are those of transformers' logits processors:
//   1. repetition penalty r   every token of the history, once: l > 0 becomes l / r, l <= 0 becomes l * r
//   2. temperature T          l / T; T = 0 is greedy: the largest logit, and nothing below applies
//   3. top-k                  the k largest
//   4. top-p                  of those, the smallest set of largest ones that holds at least p of the probability
//   5. min-p                  of those, the ones with at least min_p times the probability of the largest
//   6. one draw from the softmax over what is left
// Equal logits are ordered by id, the lowest first, so top-k keeps exactly k. The arithmetic is double. A NaN is an
// error; -inf is never drawn; where some logits are +inf, those share the probability equally.
// A sampler belongs to one sequence; the draws are decided by the seed and the stream number. After construction it
// allocates nothing.
//
// sample_rows is the same for a batch whose logits and samplers are in a device's memory: the steps, their order, the
// streams of numbers and the errors are those above; the device's own version says how exactly it draws the same
// tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include <zamba/context.hpp>
#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/generate/generation_error.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/random.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// How a token is drawn. The defaults draw from the model's own distribution.
struct SamplerOptions {
  double temperature = 1;         // 0: greedy
  Index top_k = 0;                // 0: all
  double top_p = 1;               // 1: all
  double min_p = 0;               // 0: all
  double repetition_penalty = 1;  // 1: none

  bool operator==(const SamplerOptions&) const = default;

  /// Throws where a value makes no sense, naming it.
  void check() const {
    require(is_finite(temperature) && temperature >= 0, "SamplerOptions: temperature must be 0 (greedy) or more, got ",
            temperature);
    require(top_k >= 0, "SamplerOptions: top_k must be 0 (off) or more, got ", top_k);
    require(top_p > 0 && top_p <= 1, "SamplerOptions: top_p must be above 0 and at most 1 (off), got ", top_p);
    require(min_p >= 0 && min_p <= 1, "SamplerOptions: min_p must be between 0 (off) and 1, got ", min_p);
    require(is_finite(repetition_penalty) && repetition_penalty > 0,
            "SamplerOptions: repetition_penalty must be above 0 (1: off), got ", repetition_penalty);
  }
};

namespace detail {

/// The two errors of drawing.
[[noreturn]] inline void fail_nan_logit(Index token) {
  throw_error<NoToken>("argmax: the logit of token ", token, " is NaN");
}
[[noreturn]] inline void fail_no_logit() { throw_error<NoToken>("argmax: every logit is -inf"); }

/// Throws unless each is a token; `what` are they: "GenerationOptions: stop token", say.
inline void check_tokens(std::span<const Token> tokens, Index vocabulary, const char* what) {
  for (const Token token : tokens)
    require(token >= 0 && token < vocabulary, what, " ", token, " is outside the vocabulary of ", vocabulary);
}

/// Throws unless each is a token and some other is left to be drawn.
inline void check_excluded(std::span<const Token> excluded, Index vocabulary, const char* what) {
  check_tokens(excluded, vocabulary, what);
  if (static_cast<Index>(excluded.size()) < vocabulary) return;
  std::vector<bool> left(static_cast<std::size_t>(vocabulary), true);
  for (const Token token : excluded) left[static_cast<std::size_t>(token)] = false;
  require(std::find(left.begin(), left.end(), true) != left.end(), what, "s are all of the vocabulary of ", vocabulary);
}

}  // namespace detail

/// The id of the largest logit; of equal ones the lowest. At least one must be above -inf, and none a NaN.
template <class T>
  requires std::is_floating_point_v<T> Token argmax(std::span<const T> logits) {
    std::size_t best = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (is_nan(logits[i])) detail::fail_nan_logit(static_cast<Index>(i));
      if (logits[i] > logits[best]) best = i;
    }
    require(!logits.empty(), "argmax: there are no logits");
    if (!is_finite(logits[best]) && logits[best] < 0) detail::fail_no_logit();
    return static_cast<Token>(best);
  }

class Sampler {
 public:
  /// Sequences of one batch take stream numbers of their own.
  Sampler(SamplerOptions options, Seed seed, Index vocabulary, std::uint64_t stream = 0,
          std::span<const Token> excluded = {})
      : options_(options), random_(seed, stream), excluded_(excluded.begin(), excluded.end()) {
    options.check();
    require(vocabulary > 0 && vocabulary <= std::numeric_limits<Token>::max(),
            "Sampler: the vocabulary must have 1 to 2147483647 tokens, got ", vocabulary);
    detail::check_excluded(excluded, vocabulary, "Sampler: excluded token");
    scores_.resize(static_cast<std::size_t>(vocabulary));
    seen_.resize(scores_.size(), 0);
    candidates_.reserve(scores_.size());
  }

  const SamplerOptions& options() const { return options_; }
  Index vocabulary() const { return static_cast<Index>(scores_.size()); }

  /// logits (V); history: the tokens so far, prompt and output, which the repetition penalty looks at.
  Token sample(std::span<const float> logits, std::span<const Token> history = {}) { return draw(logits, history); }
  Token sample(std::span<const double> logits, std::span<const Token> history = {}) { return draw(logits, history); }

 private:
  struct Candidate {
    double weight;  // probability over that of the most probable token
    Token id;

    bool operator<(const Candidate& other) const {  // comes earlier in the order: more probable, then lower id
      return weight != other.weight ? weight > other.weight : id < other.id;
    }
  };

  template <class T>
  Token draw(std::span<const T> logits, std::span<const Token> history) {
    require(logits.size() == scores_.size(), "Sampler: wanted ", scores_.size(), " logits, got ", logits.size());
    std::copy(logits.begin(), logits.end(), scores_.begin());
    penalise(history);
    for (const Token token : excluded_)
      scores_[static_cast<std::size_t>(token)] = -std::numeric_limits<double>::infinity();
    const Token best = argmax(std::span<const double>(scores_));
    if (options_.temperature == 0) return best;
    weigh(scores_[static_cast<std::size_t>(best)]);
    keep_top_k();
    keep_top_p();
    if (options_.min_p > 0) std::erase_if(candidates_, [this](const auto& c) { return c.weight < options_.min_p; });
    double left = random_.uniform() * total();
    for (const Candidate& candidate : candidates_) {
      left -= candidate.weight;
      if (left < 0) return candidate.id;
    }
    return best;  // rounding left a trace of the mass undrawn
  }

  void penalise(std::span<const Token> history) {
    if (options_.repetition_penalty == 1) return;
    for (const Token token : history) {
      require(token >= 0 && token < vocabulary(), "Sampler: token ", token,
              " of the history is outside the vocabulary of ", vocabulary());
      char& seen = seen_[static_cast<std::size_t>(token)];
      double& score = scores_[static_cast<std::size_t>(token)];
      if (!seen) score = score > 0 ? score / options_.repetition_penalty : score * options_.repetition_penalty;
      seen = 1;
    }
    for (const Token token : history) seen_[static_cast<std::size_t>(token)] = 0;
  }

  /// candidates_ becomes every token of positive weight exp((score - largest) / T), in the order of ids.
  void weigh(double largest) {
    candidates_.clear();
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      // Equal scores first: the difference of two infinities is a NaN.
      const double weight = scores_[i] == largest ? 1 : std::exp((scores_[i] - largest) / options_.temperature);
      if (weight > 0) candidates_.push_back({weight, static_cast<Token>(i)});
    }
  }

  void keep_top_k() {
    const auto k = static_cast<std::size_t>(options_.top_k);
    if (k == 0 || k >= candidates_.size()) return;
    const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(k);
    std::partial_sort(candidates_.begin(), end, candidates_.end());
    candidates_.erase(end, candidates_.end());
  }

  void keep_top_p() {
    if (options_.top_p == 1) return;
    // A heap, not a sort: the set is small beside the vocabulary where this filter is of use.
    const auto later = [](const Candidate& a, const Candidate& b) { return b < a; };
    const double wanted = options_.top_p * total();
    std::make_heap(candidates_.begin(), candidates_.end(), later);
    auto end = candidates_.end();
    for (double mass = 0; end != candidates_.begin() && mass < wanted; mass += end->weight) {
      std::pop_heap(candidates_.begin(), end, later);
      --end;
    }
    std::reverse(candidates_.begin(), candidates_.end());  // what was taken from the heap lies at the end, last first
    candidates_.erase(candidates_.begin() + (candidates_.end() - end), candidates_.end());
  }

  double total() const {
    double sum = 0;
    for (const Candidate& candidate : candidates_) sum += candidate.weight;
    return sum;
  }

  SamplerOptions options_;
  Random random_;
  std::vector<Token> excluded_;
  std::vector<double> scores_;         // (V)
  std::vector<char> seen_;             // (V), all 0 between calls
  std::vector<Candidate> candidates_;  // up to V
};

/// What came of one draw of sample_rows.
struct Drawn {
  enum Outcome : std::int32_t { drawn, met_nan, all_impossible };

  Token token = 0;  // where a NaN was met, the first token of which it is the logit
  Outcome outcome = drawn;

  /// The token, or the error that Sampler throws.
  Token checked() const {
    if (outcome == met_nan) detail::fail_nan_logit(token);
    if (outcome == all_impossible) detail::fail_no_logit();
    return token;
  }
};

/// The samplers of a batch, in the memory of the device that draws. Row r draws as a Sampler of stream s does where its
/// random numbers began as Random(seed, s) and its history is what `seen` marks.
struct BatchSampler {
  const SamplerOptions* options = nullptr;  // of all rows
  Random* random = nullptr;                 // (rows)
  Matrix<std::uint32_t> seen;     // (rows, ceil(V / 32)): token t is bit t % 32 of word t / 32; for the penalty only
  const Index* left = nullptr;    // (rows): tokens that a row may still get; where it is 0 none is drawn
  const Index* places = nullptr;  // (rows): which of the given logits are a row's; null: those of its own number
  Drawn* drawn = nullptr;         // (rows)
  Drawn* posted = nullptr;        // (2, rows): copies in memory that the host sees; null: none are wanted
  const Index* turn = nullptr;    // 0 or 1: which of the two copies is written
  const std::uint32_t* excluded = nullptr;  // (ceil(V / 32)): bits of the tokens that are never drawn; null: none
};

/// The steps of sample_rows on a device.
template <class Device>
struct SampleRows {
  static_assert(detail::no_version_for<Device>,
                "zamba::SampleRows has no version for this device here: include <zamba/generate/sampler.cuh> or "
                "<zamba/zamba.cuh> and compile with nvcc, or declare the model `extern template`");
};

/// Draws a token for each of `rows` rows that may still get one, from logits (at least as many, V). `greedy` says that
/// the temperature is 0: the host knows it, because the work differs.
template <class Device, class A>
void sample_rows(Context<Device>& ctx, const BatchSampler& samplers, Index rows, Matrix<const A> logits, bool greedy) {
  SampleRows<Device>::template sample<A>(ctx, samplers, rows, logits, greedy);
}

}  // namespace zamba
