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
#include <limits>
#include <span>
#include <vector>

#include <zamba/generate/sampler.hpp>
#include <zamba/host_logits.hpp>
#include <zamba/model.hpp>

namespace zamba {

struct SpeculativeOptions {
  Index max_new_tokens = 128;
  Index draft_tokens = 4;  // proposed a pass; 0: none, plain greedy decoding
  std::vector<Token> stop_tokens{};
  std::vector<Token> excluded_tokens{};  // never given, nor proposed
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
Token largest_of_row(Matrix<const A> logits, Index row, std::span<const Token> excluded) {
  std::vector<A> room;
  std::vector<float> widened;
  const auto given = host_logits<Device>(logits, row, room, widened);
  if (excluded.empty()) return argmax(given);
  using Logit = typename decltype(given)::value_type;
  std::vector<Logit> left(given.begin(), given.end());
  for (const Token token : excluded) left[static_cast<std::size_t>(token)] = -std::numeric_limits<Logit>::infinity();
  return argmax(std::span<const Logit>(left));
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

/// The next `count` tokens by a draft; its state then holds all that was pending, and none of them.
template <InferenceModel Draft>
std::vector<Token> propose(Reader<Draft>& drafter, Index count, std::span<const Token> excluded) {
  std::vector<Token> proposed;
  if (count == 0) return proposed;
  const auto largest = [&](const auto& logits) {
    return largest_of_row<typename Draft::DeviceType>(logits, 0, excluded);
  };
  const auto logits = drafter.model.extend(drafter.state, drafter.pending);
  const auto before = drafter.state.snapshot();
  proposed.push_back(largest(logits));
  while (static_cast<Index>(proposed.size()) < count)
    proposed.push_back(largest(drafter.model.extend(drafter.state, proposed.back())));
  if (count > 1) drafter.state.roll_back(before);
  drafter.pending.clear();
  return proposed;
}

/// Throws unless all fits together; how many new tokens there is room for.
template <InferenceModel M, InferenceModel Draft>
Index check_speculation(const M& model, const typename M::StateType& state, const Draft& draft,
                        const typename Draft::StateType& draft_state, const std::vector<Token>& prompt,
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
  check_tokens(prompt, model.vocabulary(), "generate_speculatively: token");
  check_tokens(options.stop_tokens, model.vocabulary(), "SpeculativeOptions: stop token");
  check_excluded(options.excluded_tokens, model.vocabulary(), "SpeculativeOptions: excluded token");
  return room;
}

template <InferenceModel M, InferenceModel Draft>
SpeculativeOutput speculate(const M& model, typename M::StateType& state, const Draft& draft,
                            typename Draft::StateType& draft_state, const std::vector<Token>& prompt,
                            const SpeculativeOptions& options) {
  const Index room = check_speculation(model, state, draft, draft_state, prompt, options);
  Reader<M> reader{model, state, prompt};
  Reader<Draft> drafter{draft, draft_state, prompt};
  reader.catch_up();
  drafter.catch_up();
  SpeculativeOutput output;
  auto before = state.snapshot();  // without what is pending
  const auto stops = [&](Token token) {
    return std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end();
  };
  std::vector<Token> fresh;  // of the present pass
  const char* whose = "";    // logits are looked at
  try {
    for (Index left = std::min(options.max_new_tokens, room); left > 0;) {
      fresh.clear();
      whose = "generate_speculatively, the draft";
      const auto proposed = propose(drafter, std::min(options.draft_tokens, left - 1), options.excluded_tokens);
      whose = "generate_speculatively, the model";
      std::vector<Token> tokens = reader.pending;
      tokens.insert(tokens.end(), proposed.begin(), proposed.end());
      const auto logits = model.extend(state, tokens, Positions::all);
      bool running = true, agreed = true;
      while (running && agreed) {
        const std::size_t n = fresh.size();
        fresh.push_back(largest_of_row<typename M::DeviceType>(
            logits, static_cast<Index>(reader.pending.size() + n) - 1, options.excluded_tokens));
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
      const bool catches_up = left == 0 || reader.pending.size() > most_pending;
      if (catches_up) reader.catch_up();
      if (whole || catches_up) before = state.snapshot();
    }
  } catch (const NoToken& why) {
    output.tokens.insert(output.tokens.end(), fresh.begin(), fresh.end());
    FailedRows failed;
    failed.add(0, output.tokens.size(), why);
    failed.check(whose, {output.tokens});
  }
  drafter.catch_up();
  return output;
}

}  // namespace detail

/// The new tokens after `prompt`, as generate() gives them with temperature 0. Both states have one row and the same
/// past; afterwards both hold everything but the last new token. A sequence ends with a stop token (which is returned),
/// after max_new_tokens, or where one of the states would be full. Where logits give no token, because one is NaN, a
/// GenerationError says whose and holds the tokens before; the states are then to be reset. An OutOfMemory leaves both
/// as they were.
template <InferenceModel M, InferenceModel Draft>
SpeculativeOutput generate_speculatively(const M& model, typename M::StateType& state, const Draft& draft,
                                         typename Draft::StateType& draft_state, const std::vector<Token>& prompt,
                                         const SpeculativeOptions& options) {
  const auto run = [&] { return detail::speculate(model, state, draft, draft_state, prompt, options); };
  return detail::all_or_none("generate_speculatively", state,
                             [&] { return detail::all_or_none("generate_speculatively", draft_state, run); });
}

}  // namespace zamba
