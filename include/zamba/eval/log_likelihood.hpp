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
#include <vector>

#include <zamba/detail/host_logits.hpp>
#include <zamba/detail/softmax.hpp>
#include <zamba/model.hpp>

namespace zamba {

/// log p of a token, from the logits of its position. Throws where the token is outside, or a NaN among the logits.
template <class A>
double log_probability(std::span<const A> logits, Token token) {
  const auto size = static_cast<Index>(logits.size());
  require(token >= 0 && token < size, "log_probability: token ", token, " is outside the vocabulary of ", size);
  constexpr Index chunk = 1024;
  A room[chunk];
  const A largest = detail::largest(logits.data(), size);
  double sum = 0;
  for (Index first = 0; first < size; first += chunk) {
    const Index count = std::min(chunk, size - first);
    std::copy_n(logits.data() + first, count, room);
    sum += static_cast<double>(detail::exponentials(room, largest, count));
  }
  require(!is_nan(sum), "log_probability: a logit is NaN");
  return static_cast<double>(logits[static_cast<std::size_t>(token)]) - static_cast<double>(largest) - std::log(sum);
}

/// Appends tokens to the rows of a state, as Model::extend does, and gives log p of each one's target, the token wanted
/// after it; 0 where the target is negative: nothing is wanted there.
template <InferenceModel M>
std::vector<double> log_likelihoods(const M& model, typename M::StateType& state, const Tokens& tokens,
                                    std::span<const Token> targets) {
  require(targets.size() == tokens.tokens.size(), "log_likelihoods: ", tokens.tokens.size(), " tokens but ",
          targets.size(), " targets");
  const auto logits = model.extend(state, tokens, Positions::all);
  std::vector<std::remove_const_t<std::remove_pointer_t<decltype(logits.data)>>> room;
  std::vector<float> widened;
  std::vector<double> result(targets.size(), 0.);
  for (std::size_t i = 0; i < targets.size(); ++i)
    if (targets[i] >= 0)
      result[i] = log_probability(
          detail::host_logits<typename M::DeviceType>(logits, static_cast<Index>(i), room, widened), targets[i]);
  return result;
}

}  // namespace zamba
