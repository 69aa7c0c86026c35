// SPDX-License-Identifier: MIT
// Perplexity of a text: e to the mean loss of its tokens, in windows that slide over it.
//
//   window k      reads tokens [k S, k S + L) from an empty state and is judged by those of the tokens that follow
//   which
//                 no window before it was judged by: L of the first window, S of any other
//   perplexity    exp(sum of losses (nats) / number of judged tokens)
//
// Every token but the first is judged once; where a token stands before each window (`begin`), the first one too.
// S = L packs the windows: cheapest, but what follows a cut is judged by a model that knows little. Small S judges
// every token by nearly L others and costs L / S as much. Compare values of equal windows and equal tokenizers only;
// bits_per_byte() needs no equal tokenizers.
// Numeric contract: that of log_likelihood.hpp; sums in double, in the order of the text.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <optional>
#include <span>
#include <vector>

#include <zamba/eval/bits_per_byte.hpp>
#include <zamba/eval/log_likelihood.hpp>

namespace zamba {

struct WindowOptions {
  Index length = 2048;           // L, `begin` counted
  Index stride = 0;              // S; 0: as much as a window reads of the text, packed
  std::optional<Token> begin{};  // the token that begins a text, before each window
};

/// Called as callback(done, all) with numbers of windows or items; false ends the work with an Error.
template <class F>
concept EvaluationCallback = std::invocable<F&, Index, Index> && requires(F& f) {
  { f(Index{}, Index{}) } -> std::convertible_to<bool>;
};

/// The callback that lets the work go on.
struct GoOn {
  bool operator()(Index, Index) const { return true; }
};

namespace detail {

/// The judged logits that exist at a time, in rows.
inline constexpr Index judged_at_once = 256;

}  // namespace detail

/// The losses of a text's tokens, added up.
template <class Device, class ModelType, EvaluationCallback Callback = GoOn>
LossSum text_loss(Context<Device>& ctx, const ModelType& model, std::span<const Token> text,
                  const WindowOptions& options, Callback&& callback = {}) {
  const Index size = static_cast<Index>(text.size()), before = options.begin ? 1 : 0, length = options.length - before;
  const Index stride = options.stride ? options.stride : length;
  require(size + before >= 2, "text_loss: the text has ", size, " tokens, at least ", 2 - before, " are needed");
  require(length >= 1, "WindowOptions: length must be at least ", 1 + before, ", got ", options.length);
  require(stride >= 1 && stride <= length, "WindowOptions: stride must be 1 to ", length, ", or 0 (packed), got ",
          options.stride);
  const Index last = size - 1, windows = 1 + std::max<Index>(0, (last - length + stride - 1) / stride);
  auto state = model.new_state({.batch = 1, .max_length = std::min(length, size) + before});
  std::vector<Token> tokens;
  std::vector<Token> targets;
  LossSum total;
  Index judged = 1 - before;  // of the text, or passed over for want of anything before them
  for (Index window = 0; window < windows; ++window) {
    const Index begin = window * stride, end = std::min(begin + length, last);
    tokens.assign(text.begin() + begin, text.begin() + end);
    targets.assign(text.begin() + begin + 1, text.begin() + end + 1);
    if (options.begin) {
      tokens.insert(tokens.begin(), *options.begin);
      targets.insert(targets.begin(), text[static_cast<std::size_t>(begin)]);
    }
    const auto inputs = std::span<const Token>(tokens), wanted = std::span<const Token>(targets);
    const auto known = static_cast<std::size_t>(judged - (begin + 1 - before));  // inputs whose targets were judged
    state.reset();
    if (known > 0) model.extend(ctx, state, inputs.first(known));
    for (std::size_t at = known; at < inputs.size(); at += detail::judged_at_once) {
      const std::size_t count = std::min<std::size_t>(detail::judged_at_once, inputs.size() - at);
      for (const double value :
           log_likelihoods(ctx, model, state, inputs.subspan(at, count), wanted.subspan(at, count)))
        total.sum -= value;
      total.count += static_cast<Index>(count);
    }
    judged = end + 1;
    require(callback(window + 1, windows), "text_loss: ended after ", window + 1, " of ", windows, " windows");
  }
  return total;
}

inline double perplexity(const LossSum& loss) { return std::exp(loss.mean()); }

}  // namespace zamba
