// SPDX-License-Identifier: MIT
// Perplexity of a text: e to the mean loss of its tokens, in windows that slide over it.
//
//   window k      reads tokens [k S, k S + L) from an empty state; judged are those of the tokens behind each that no
//                 window before it judged: L in the first window, S in any other
//   perplexity    exp(sum of losses (nats) / number of judged tokens)
//
// Every token but the first is judged once; where a token stands before each window (`begin`), the first one too.
// S = L packs the windows: cheapest, but what follows a cut is judged by a model that knows little. Small S judges
// every token by nearly L others and costs L / S as much. Compare values of equal windows and equal tokenizers only;
// bits_per_byte() needs no equal tokenizers.
// Numeric contract: that of Model::loss, or, on a device that does not train, that of log_likelihood.hpp: there the
// host reads all logits. Sums of a chunk are added in double, in the order of the text.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include <zamba/eval/bits_per_byte.hpp>
#include <zamba/eval/callback.hpp>
#include <zamba/eval/log_likelihood.hpp>
#include <zamba/model.hpp>
#include <zamba/number.hpp>

namespace zamba {

struct WindowOptions {
  Index length = 2048;           // L, `begin` counted
  Index stride = 0;              // S; 0: as much as a window reads of the text, packed
  std::optional<Token> begin{};  // the token that begins a text, before each window
};

namespace detail {

/// Appends tokens to a state of one row, and gives the losses of their targets.
template <InferenceModel M>
LossSum loss_of_chunk(const M& model, typename M::StateType& state, std::span<const Token> tokens,
                      std::span<const Token> targets) {
  if constexpr (LossModel<M>) {
    bool trains = true;
    if constexpr (requires { model.trains(); }) trains = model.trains();  // known at run time
    const Index offsets[] = {0, static_cast<Index>(tokens.size())};
    if (trains) return model.loss({tokens, targets, offsets}, &state);
  }
  LossSum loss;
  loss.count = static_cast<Index>(targets.size());
  for (const double value : log_likelihoods_or_nan(model, state, tokens, targets)) loss.sum -= value;
  return loss;
}

template <InferenceModel M, EvaluationCallback Callback>
LossSum text_loss(const M& model, std::span<const Token> text, const WindowOptions& options, Callback&& callback) {
  const Index size = static_cast<Index>(text.size()), before = options.begin ? 1 : 0;
  const Index length = std::max<Index>(options.length, 0) - before;
  const Index stride = options.stride ? options.stride : length;
  require(size + before >= 2, "text_loss: the text has ", size, " tokens, at least ", 2 - before, " are needed");
  require(options.length >= 1 + before, "WindowOptions: length must be at least ", 1 + before, ", got ",
          options.length);
  require(stride >= 1 && stride <= length, "WindowOptions: stride must be 1 to ", length, ", or 0 (packed), got ",
          options.stride);
  const Index last = size - 1, windows = 1 + ceil_div(std::max<Index>(0, last - length), stride);
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
    if (known > 0) model.extend(state, inputs.first(known));
    constexpr auto chunk = static_cast<std::size_t>(DeviceTraits<typename M::DeviceType>::prefill_chunk);
    for (std::size_t at = known; at < inputs.size(); at += chunk) {
      const std::size_t count = std::min(chunk, inputs.size() - at);
      const LossSum loss = loss_of_chunk(model, state, inputs.subspan(at, count), wanted.subspan(at, count));
      require(!is_nan(loss.sum), "text_loss: the loss of window ", window, " is NaN, among the ", count,
              " tokens from token ", begin + static_cast<Index>(at), " of the text on");
      total.sum += loss.sum;
      total.count += loss.count;
    }
    judged = end + 1;
    require(callback(window + 1, windows), "text_loss: ended after ", window + 1, " of ", windows, " windows");
  }
  return total;
}

}  // namespace detail

/// The losses of a text's tokens, added up. An Error names a window whose loss is NaN.
template <InferenceModel M, EvaluationCallback Callback = GoOn>
LossSum text_loss(const M& model, std::span<const Token> text, const WindowOptions& options, Callback&& callback = {}) {
  return detail::or_out_of_memory("text_loss", [&] { return detail::text_loss(model, text, options, callback); });
}

inline double perplexity(const LossSum& loss) { return std::exp(loss.mean()); }

}  // namespace zamba
