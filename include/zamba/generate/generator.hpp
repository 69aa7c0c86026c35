// SPDX-License-Identifier: MIT
// generate: prompts in, new tokens out. Prefill of all rows at once, then one token for every row that still runs.
//
//   per row   l = logits after the row's last token;  token = sampler(l, prompt and output so far);  append
//
// On a device that draws by itself (CUDA) a step and its draws are one recorded piece of work, and the host only reads
// which tokens came. Without a callback it does so while the next step runs; with one, the next step waits for it,
// because a row that ends leaves no trace of its last token in the state.
//
// A row ends with a stop token (which is returned, as transformers does), after max_new_tokens, when its sequence, the
// new tokens counted, is max_length long, or when the callback returns false. Rows that ended take no part in further
// steps. Where a row's logits give no token, because one is NaN, that row ends; when all others have, a GenerationError
// names it and holds the tokens of all.
//
// The state may hold a past, which the prompt continues (and which the repetition penalty does not see). Afterwards it
// holds everything but each row's last new token: to go on, let that token begin the next prompt.
//
// Row r draws from stream `stream + r` of the seed, whatever the other rows are: alone, it gives the same tokens where
// its `stream` is set to that number. (The logits of a row in a batch and alone agree to rounding, so a draw that falls
// within that of a boundary may differ.) No step after the first allocates memory.
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <zamba/generate/device_loop.hpp>
#include <zamba/generate/generation_options.hpp>
#include <zamba/generate/sampler.hpp>
#include <zamba/host_logits.hpp>
#include <zamba/model.hpp>

namespace zamba {

/// Called as callback(row, token) for every new token, stop tokens among them; false ends the row.
template <class F>
concept TokenCallback = std::invocable<F&, Index, Token> && requires(F& f) {
  { f(Index{}, Token{}) } -> std::convertible_to<bool>;
};

/// The callback that lets every row run on.
struct RunOn {
  bool operator()(Index, Token) const { return true; }
};

namespace detail {

/// generate, where extend(tokens) appends to the state and returns logits on Device.
template <class Device, class Extend, class StateType, class Callback>
std::vector<std::vector<Token>> generate_rows(Extend&& extend, Index vocabulary, StateType& state,
                                              std::span<const std::vector<Token>> prompts,
                                              const GenerationOptions& options, Callback&& callback) {
  using A = std::remove_cvref_t<decltype(*extend(std::declval<Tokens>()).data)>;
  check_generation(state, prompts, vocabulary, options);
  struct Row {
    Sampler sampler;
    std::vector<Token> sequence;  // prompt and output
    std::size_t prompt, end;      // lengths of the sequence
    bool running;
  };
  std::vector<Row> rows;
  PackedPrompts next(prompts);
  std::vector<Token>& tokens = next.tokens;
  std::vector<Index>& lengths = next.lengths;
  for (std::size_t r = 0; r < prompts.size(); ++r) {
    const Index prompt = static_cast<Index>(prompts[r].size());
    const Index room = state.max_length() - state.length(static_cast<Index>(r)) - prompt;
    const auto end = static_cast<std::size_t>(prompt + std::min(options.max_new_tokens, room));
    rows.push_back({Sampler(options.sampling, options.seed, vocabulary, options.stream + r, options.excluded_tokens),
                    prompts[r], prompts[r].size(), end, end > prompts[r].size()});
    rows.back().sequence.reserve(std::min(end, prompts[r].size() + most_reserved));
  }
  std::vector<A> room;
  std::vector<float> widened;
  FailedRows failed;
  while (!tokens.empty()) {
    const Matrix<const A> logits = extend(Tokens(tokens, lengths));
    tokens.clear();
    for (std::size_t r = 0; r < rows.size(); ++r) {
      Row& row = rows[r];
      lengths[r] = 0;
      if (!row.running) continue;
      const Index at = static_cast<Index>(r);
      Token token;
      try {
        token = row.sampler.sample(host_logits<Device>(logits, at, room, widened), row.sequence);
      } catch (const NoToken& why) {
        failed.add(at, row.sequence.size() - row.prompt, why);
        row.running = false;
        continue;
      }
      row.sequence.push_back(token);
      const auto& stops = options.stop_tokens;
      row.running = callback(at, token) && row.sequence.size() < row.end &&
                    std::find(stops.begin(), stops.end(), token) == stops.end();
      if (!row.running) continue;
      tokens.push_back(token);
      lengths[r] = 1;
    }
  }
  std::vector<std::vector<Token>> output;
  for (const Row& row : rows)
    output.emplace_back(row.sequence.begin() + static_cast<std::ptrdiff_t>(row.prompt), row.sequence.end());
  failed.check("generate", output);
  return output;
}

/// A callback as Model::generate takes it.
template <class Callback>
TokenFunction token_function(Callback& callback) {
  if constexpr (std::is_same_v<std::remove_cv_t<Callback>, RunOn>)
    return {};
  else
    return std::ref(callback);
}

}  // namespace detail

/// The new tokens of each row: prompts[r] continues row r of the state. The model is a Model or an AnyModel, and
/// computes with the calling thread's own context. Throws before anything changes for a wrong number of prompts, an
/// empty one, one that exceeds max_length, or a token outside the vocabulary; throws a GenerationError at the end for
/// rows that got no token. An OutOfMemory leaves the state as it was.
template <InferenceModel M, TokenCallback Callback = RunOn>
std::vector<std::vector<Token>> generate(const M& model, typename M::StateType& state,
                                         const std::vector<std::vector<Token>>& prompts,
                                         const GenerationOptions& options, Callback&& callback = {}) {
  const auto by_device = [&](const auto& drawing) {
    return drawing.generate(state, std::span(prompts), options, detail::token_function(callback));
  };
  const auto by_host = [&](const auto& reading) {
    return detail::all_or_none("generate", state, [&] {
      return detail::generate_rows<typename M::DeviceType>(
          [&](const Tokens& tokens) { return reading.extend(state, tokens); }, reading.vocabulary(), state,
          std::span(prompts), options, callback);
    });
  };
  if constexpr (requires { model.draws(); })  // an AnyModel knows at run time
    return model.draws() ? by_device(model) : by_host(model);
  else if constexpr (draws<typename M::DeviceType>)
    return by_device(model);
  else
    return by_host(model);
}

/// As above, with a context given.
template <class Net, class T, class Device, TokenCallback Callback = RunOn>
std::vector<std::vector<Token>> generate(Context<Device>& ctx, const Model<Net, T, Device>& model,
                                         State<Net, T, Device>& state, std::span<const std::vector<Token>> prompts,
                                         const GenerationOptions& options, Callback&& callback = {}) {
  if constexpr (draws<Device>)
    return model.generate(ctx, state, prompts, options, detail::token_function(callback));
  else
    return detail::all_or_none("generate", state, [&] {
      return detail::generate_rows<Device>([&](const Tokens& tokens) { return model.extend(ctx, state, tokens); },
                                           Net::vocabulary, state, prompts, options, callback);
    });
}

/// One prompt, for a state of one row; the callback gets row 0.
template <InferenceModel M, TokenCallback Callback = RunOn>
std::vector<Token> generate(const M& model, typename M::StateType& state, const std::vector<Token>& prompt,
                            const GenerationOptions& options, Callback&& callback = {}) {
  return generate(model, state, std::vector<std::vector<Token>>{prompt}, options, callback)[0];
}
template <class Net, class T, class Device, TokenCallback Callback = RunOn>
std::vector<Token> generate(Context<Device>& ctx, const Model<Net, T, Device>& model, State<Net, T, Device>& state,
                            const std::vector<Token>& prompt, const GenerationOptions& options,
                            Callback&& callback = {}) {
  return generate(ctx, model, state, std::span<const std::vector<Token>>(&prompt, 1), options, callback)[0];
}

}  // namespace zamba
