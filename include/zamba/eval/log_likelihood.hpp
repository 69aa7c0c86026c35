// SPDX-License-Identifier: MIT
// What a model thinks of given tokens: the logarithm of the probability that it gives them.
//
//   log p(target | all before it) = l[target] - log sum_v e^l[v],    l (V) the logits after the token before the target
//
// Numeric contract: nats, in double. Exponentials of 1024 logits are summed in the logits' type, those sums in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include <zamba/host_logits.hpp>
#include <zamba/kernel/softmax.hpp>
#include <zamba/model.hpp>
#include <zamba/number.hpp>

namespace zamba {

namespace detail {

/// log_probability, or NaN where a logit is.
template <class A>
double log_probability_or_nan(std::span<const A> logits, Token token) {
  const auto size = static_cast<Index>(logits.size());
  require(token >= 0 && token < size, "log_probability: token ", token, " is outside the vocabulary of ", size);
  constexpr Index chunk = 1024;
  A room[chunk];
  const A largest = kernel::largest(logits.data(), size);
  double sum = 0;
  for (Index first = 0; first < size; first += chunk) {
    const Index count = std::min(chunk, size - first);
    std::copy_n(logits.data() + first, count, room);
    sum += static_cast<double>(kernel::exponentials(room, largest, count));
  }
  return static_cast<double>(logits[static_cast<std::size_t>(token)]) - static_cast<double>(largest) - std::log(sum);
}

template <InferenceModel M>
std::vector<double> log_likelihoods_or_nan(const M& model, typename M::StateType& state, const Tokens& tokens,
                                           std::span<const Token> targets) {
  require(targets.size() == tokens.tokens.size(), "log_likelihoods: ", tokens.tokens.size(), " tokens but ",
          targets.size(), " targets");
  const auto logits = model.extend(state, tokens, Positions::all);
  std::vector<std::remove_const_t<std::remove_pointer_t<decltype(logits.data)>>> room;
  std::vector<float> widened;
  std::vector<double> result(targets.size(), 0.);
  for (std::size_t i = 0; i < targets.size(); ++i)
    if (targets[i] >= 0)
      result[i] = log_probability_or_nan(
          host_logits<typename M::DeviceType>(logits, static_cast<Index>(i), room, widened), targets[i]);
  return result;
}

/// The row of a token, and how many tokens of the row are before it.
inline std::pair<Index, Index> place_of(const Tokens& tokens, Index token) {
  std::size_t row = 0;
  for (; row < tokens.lengths.size() && token >= tokens.lengths[row]; ++row) token -= tokens.lengths[row];
  return {static_cast<Index>(row), token};
}

}  // namespace detail

/// log p of a token, from the logits of its position. Throws where the token is outside, or a NaN among the logits.
template <class A>
double log_probability(std::span<const A> logits, Token token) {
  const double value = detail::log_probability_or_nan(logits, token);
  require(!is_nan(value), "log_probability: a logit is NaN");
  return value;
}

/// Appends tokens to the rows of a state, as Model::extend does, and gives log p of each one's target, the token wanted
/// after it; 0 where the target is negative: nothing is wanted there. An Error names the row whose logits hold a NaN;
/// an OutOfMemory leaves the state as it was.
template <InferenceModel M>
std::vector<double> log_likelihoods(const M& model, typename M::StateType& state, const Tokens& tokens,
                                    std::span<const Token> targets) {
  const auto values = detail::all_or_none(
      "log_likelihoods", state, [&] { return detail::log_likelihoods_or_nan(model, state, tokens, targets); });
  const auto nan = std::find_if(values.begin(), values.end(), [](double value) { return is_nan(value); });
  if (nan == values.end()) return values;
  const auto [row, position] = detail::place_of(tokens, nan - values.begin());
  fail("log_likelihoods: row ", row, ": a logit after token ", position, " of those given is NaN");
}

}  // namespace zamba
