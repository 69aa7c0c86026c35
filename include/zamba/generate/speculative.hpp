// SPDX-License-Identifier: MIT
// Speculative decoding (arXiv 2211.17192), greedy: a draft model proposes the next tokens one by one, the model judges
// them all in one pass, and those are kept that it would have given itself.
//
//   per pass   d_1 .. d_k = the draft's largest logits;   g_0 .. g_k = the model's, after what is known and each d_i
//              new tokens: d_1 .. d_n, g_n   for the largest n with d_i = g_{i-1} for all i <= n
//
// The output is that of greedy generate(): a pass of several tokens agrees with passes of one to rounding, so tokens
// differ only where two logits are that close. A pass of few tokens takes about as long as one of a single token,
// because it waits for the weights; so the gain is the number of tokens that a pass accepts.
//
// A recurrent state cannot go back to the middle of a pass. Where a proposal is refused, the state returns to its
// snapshot, and what was accepted is read again at the head of the next pass: at most `most_pending` tokens, no pass
// more. Each pass allocates the draft's snapshot, and the model's where the one before is outdated.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include <zamba/detail/host_logits.hpp>
#include <zamba/generate/sampler.hpp>
#include <zamba/model.hpp>

namespace zamba {

struct SpeculativeOptions {
  Index max_new_tokens = 128;
  Index draft_tokens = 4;  // proposed a pass; 0: none, plain greedy decoding
  std::vector<Token> stop_tokens{};
};

struct SpeculativeOutput {
  std::vector<Token> tokens;
  Index passes = 0, proposed = 0, accepted = 0;  // passes of the model behind the prompt; tokens of the draft
};

namespace detail {

/// Tokens read again at the head of a pass, at most: with those proposed, they stay within what `linear` computes at
/// the pace of memory.
inline constexpr std::size_t most_pending = 16;

template <class Device, class A>
Token largest_of_row(Matrix<const A> logits, Index row) {
  std::vector<A> room;
  std::vector<float> widened;
  return argmax(host_logits<Device>(logits, row, room, widened));
}

/// A model, its state of one row, and the known tokens that the state does not hold.
template <InferenceModel M>
struct Reader {
  const M& model;
  typename M::StateType& state;
  std::vector<Token> pending;

  /// Reads all pending tokens but the last.
  void catch_up() {
    if (pending.size() > 1) model.extend(state, std::span<const Token>(pending).first(pending.size() - 1));
    pending.erase(pending.begin(), pending.end() - 1);
  }
};

}  // namespace detail

/// The new tokens after `prompt`, as generate() gives them with temperature 0. Both states have one row and the same
/// past; afterwards both hold everything but the last new token. A sequence ends with a stop token (which is returned),
/// after max_new_tokens, or where one of the states would be full.
template <InferenceModel M, InferenceModel Draft>
SpeculativeOutput generate_speculatively(const M& model, typename M::StateType& state, const Draft& draft,
                                         typename Draft::StateType& draft_state, const std::vector<Token>& prompt,
                                         const SpeculativeOptions& options) {
  require(state.batch() == 1 && draft_state.batch() == 1, "generate_speculatively: states of one row are needed, got ",
          state.batch(), " and ", draft_state.batch());
  require(model.vocabulary() == draft.vocabulary(), "generate_speculatively: the model has a vocabulary of ",
          model.vocabulary(), ", the draft of ", draft.vocabulary());
  require(state.length() == draft_state.length(), "generate_speculatively: the state holds ", state.length(),
          " positions, that of the draft ", draft_state.length());
  require(options.max_new_tokens >= 0 && options.draft_tokens >= 0,
          "SpeculativeOptions: max_new_tokens and draft_tokens must be 0 or more, got ", options.max_new_tokens,
          " and ", options.draft_tokens);
  require(!prompt.empty(), "generate_speculatively: the prompt is empty, at least one token is needed");
  const Index max_length = std::min(state.max_length(), draft_state.max_length());
  const Index room = max_length - state.length() - static_cast<Index>(prompt.size());
  require(room >= 0, "generate_speculatively: the state holds ", state.length(), " positions, and the prompt of ",
          prompt.size(), " would exceed max_length ", max_length);

  for (const Token token : prompt)
    require(token >= 0 && token < model.vocabulary(), "generate_speculatively: token ", token,
            " is outside the vocabulary of ", model.vocabulary());

  detail::Reader<M> reader{model, state, prompt};
  detail::Reader<Draft> drafter{draft, draft_state, prompt};
  reader.catch_up();
  drafter.catch_up();
  SpeculativeOutput output;
  auto before = state.snapshot();  // without what is pending
  const auto stops = [&](Token token) {
    return std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end();
  };
  for (Index left = std::min(options.max_new_tokens, room); left > 0;) {
    std::vector<Token> proposed;
    const Index wanted = std::min(options.draft_tokens, left - 1);
    if (wanted > 0) {
      auto logits = draft.extend(draft_state, drafter.pending);
      const auto draft_before = draft_state.snapshot();
      proposed.push_back(detail::largest_of_row<typename Draft::DeviceType>(logits, 0));
      while (static_cast<Index>(proposed.size()) < wanted) {
        logits = draft.extend(draft_state, proposed.back());
        proposed.push_back(detail::largest_of_row<typename Draft::DeviceType>(logits, 0));
      }
      if (wanted > 1) draft_state.roll_back(draft_before);
      drafter.pending.clear();
    }

    std::vector<Token> tokens = reader.pending, fresh;
    tokens.insert(tokens.end(), proposed.begin(), proposed.end());
    const auto logits = model.extend(state, tokens, Positions::all);
    bool running = true, agreed = true;
    while (running && agreed) {
      const std::size_t n = fresh.size();
      fresh.push_back(
          detail::largest_of_row<typename M::DeviceType>(logits, static_cast<Index>(reader.pending.size() + n) - 1));
      running = !stops(fresh.back());
      agreed = n < proposed.size() && fresh.back() == proposed[n];
      output.accepted += agreed;
    }
    output.proposed += static_cast<Index>(proposed.size());
    output.passes += 1;
    output.tokens.insert(output.tokens.end(), fresh.begin(), fresh.end());
    left = running ? left - static_cast<Index>(fresh.size()) : 0;

    drafter.pending.insert(drafter.pending.end(), fresh.begin(), fresh.end());
    const bool whole = fresh.size() == proposed.size() + 1;  // the state holds all but the last token
    if (!whole) state.roll_back(before);
    if (whole) reader.pending.clear();
    reader.pending.insert(reader.pending.end(), whole ? fresh.end() - 1 : fresh.begin(), fresh.end());
    const bool catches_up = left == 0 || reader.pending.size() > detail::most_pending;
    if (catches_up) reader.catch_up();
    if (whole || catches_up) before = state.snapshot();
  }
  drafter.catch_up();
  return output;
}

}  // namespace zamba
