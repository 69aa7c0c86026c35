// SPDX-License-Identifier: MIT
// Generation where the device draws the tokens and makes the next step's input of them.
//
// All that a step reads and writes lies at the same place for every call with the same state, whatever the options, so
// a recorded step serves them all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <zamba/array.hpp>
#include <zamba/generate/generation_error.hpp>
#include <zamba/generate/generation_options.hpp>
#include <zamba/generate/sampler.hpp>
#include <zamba/model.hpp>

namespace zamba {

/// A batch that a device generates for, in its memory: the input of a step, as Sequences has it, and what decides the
/// next one's.
struct GenerationRows {
  Index rows = 0;
  Vector<Index> offsets;           // (rows + 1): a row that has ended has no token
  Vector<Index> starts;            // (rows)
  Vector<Token> tokens;            // (rows); those beyond offsets[rows] are any tokens
  Vector<Index> left;              // (rows): tokens that a row may still get, 0 where it has ended
  Vector<Index> turn;              // (1): 0 or 1
  Vector<std::uint32_t> stops;     // (ceil(V / 32)): bits of the tokens that end a row
  Matrix<std::uint32_t> seen;      // (rows, ceil(V / 32)): bits of the tokens of each row's prompt and output
  Vector<Drawn> drawn;             // (rows)
  Vector<std::uint32_t> excluded;  // (ceil(V / 32)): bits of the tokens that are never drawn
};

/// The step of advance_rows on a device.
template <class Device>
struct AdvanceRows {
  static_assert(detail::no_version_for<Device>,
                "zamba::AdvanceRows has no version for this device here: include <zamba/generate/generator.cuh> or "
                "<zamba/zamba.cuh> and compile with nvcc, or declare the model `extern template`");
};

/// After a draw: starts go past the tokens of the step before, and tokens and offsets become what was drawn for the
/// rows that run on. A row ends with a stop token, when nothing is left, or where its draw failed.
template <class Device>
void advance_rows(Context<Device>& ctx, const GenerationRows& rows) {
  AdvanceRows<Device>::advance(ctx, rows);
}

namespace detail {

inline void set_bit(std::uint32_t* words, Token token) { words[token / 32] |= std::uint32_t{1} << token % 32; }

/// In the arena of the context, before the first draw.
template <class Device>
GenerationRows generation_rows(Context<Device>& ctx, std::span<const Index> lengths, std::span<const Index> left,
                               std::span<const std::vector<Token>> prompts, Index vocabulary,
                               const GenerationOptions& options) {
  auto& arena = ctx.arena();
  const Index rows = static_cast<Index>(lengths.size()), words = ceil_div(vocabulary, 32);
  const GenerationRows there{rows,
                             arena.template tensor<Index>(rows + 1),
                             arena.template tensor<Index>(rows),
                             arena.template tensor<Token>(rows),
                             arena.template tensor<Index>(rows),
                             arena.template tensor<Index>(1),
                             arena.template tensor<std::uint32_t>(words),
                             arena.template tensor<std::uint32_t>(rows, words),
                             arena.template tensor<Drawn>(rows),
                             arena.template tensor<std::uint32_t>(words)};
  ctx.zero(there.offsets);
  ctx.zero(there.tokens);
  ctx.zero(there.turn);
  ctx.zero(there.drawn);
  ctx.upload(lengths.data(), there.starts);
  ctx.upload(left.data(), there.left);
  std::vector<std::uint32_t> bits;
  for (const auto& [tokens, to] :
       {std::pair(&options.stop_tokens, there.stops), std::pair(&options.excluded_tokens, there.excluded)}) {
    bits.assign(static_cast<std::size_t>(words), 0);
    for (const Token token : *tokens) set_bit(bits.data(), token);
    ctx.upload(bits.data(), to);
  }
  bits.assign(static_cast<std::size_t>(rows * words), 0);
  for (Index row = 0; row < rows; ++row)
    for (const Token token : prompts[static_cast<std::size_t>(row)]) set_bit(bits.data() + row * words, token);
  ctx.upload(bits.data(), there.seen.flat());
  return there;
}

/// A sampler for each row, beside it.
template <class Device>
BatchSampler batch_sampler(Context<Device>& ctx, const GenerationRows& there, const GenerationOptions& options,
                           Drawn* posted) {
  std::vector<Random> random;
  for (Index row = 0; row < there.rows; ++row)
    random.emplace_back(options.seed, options.stream + static_cast<std::uint64_t>(row));
  const auto streams = ctx.arena().template tensor<Random>(there.rows);
  ctx.upload(random.data(), streams);
  return {ctx.readable(&options.sampling, 1),
          streams.data,
          there.seen,
          there.left.data,
          nullptr,
          there.drawn.data,
          posted,
          there.turn.data,
          options.excluded_tokens.empty() ? nullptr : there.excluded.data};
}

/// What the host knows of a generation: the tokens that came, and how many more each row may get.
class GenerationOutput {
 public:
  template <class StateType>
  GenerationOutput(const StateType& state, std::span<const std::vector<Token>> prompts,
                   const GenerationOptions& options)
      : options_(options), tokens_(prompts.size()) {
    for (std::size_t row = 0; row < prompts.size(); ++row) {
      const Index at = static_cast<Index>(row), prompt = static_cast<Index>(prompts[row].size());
      left_.push_back(std::min(options.max_new_tokens, state.max_length() - state.length(at) - prompt));
      tokens_[row].reserve(std::min(static_cast<std::size_t>(left_.back()), most_reserved));
    }
  }

  /// Tokens that a row may still get, 0 where it has ended.
  std::span<const Index> left() const { return left_; }
  Index most_left() const { return *std::max_element(left_.begin(), left_.end()); }
  /// The last token of a row, as a span.
  std::span<const Token> last(Index row) const { return std::span(&item(tokens_, row).back(), 1); }

  /// Takes what was drawn for the rows, and gives it to the callback; ended(row) is told of a row that the callback
  /// ends. By itself the device comes to the same.
  template <class Ended>
  void read(const Drawn* drawn, const TokenFunction& callback, Ended&& ended) {
    for (Index row = 0; row < static_cast<Index>(left_.size()); ++row) {
      Index& left = item(left_, row);
      if (left == 0) continue;
      std::vector<Token>& tokens = item(tokens_, row);
      try {
        tokens.push_back(drawn[row].checked());
      } catch (const NoToken& why) {
        failed_.add(row, tokens.size(), why);
        left = 0;
        continue;
      }
      const auto& stops = options_.stop_tokens;
      const bool stopped = std::find(stops.begin(), stops.end(), tokens.back()) != stops.end();
      left = stopped ? 0 : left - 1;
      if (!callback || callback(row, tokens.back()) || left == 0) continue;
      left = 0;
      ended(row);
    }
  }

  /// All tokens; throws the errors of rows that got none.
  std::vector<std::vector<Token>> take() {
    failed_.check("generate", tokens_);
    return std::move(tokens_);
  }

 private:
  const GenerationOptions& options_;
  std::vector<std::vector<Token>> tokens_;
  std::vector<Index> left_;
  FailedRows failed_;
};

}  // namespace detail

template <class Net, class T, class Device>
std::vector<std::vector<Token>> Model<Net, T, Device>::generate(
    Context<Device>& ctx, StateType& state, std::span<const std::vector<Token>> prompts,
    const GenerationOptions& options, const TokenFunction& callback) const requires draws<Device> {
  detail::check_generation(state, prompts, Net::vocabulary, options);
  options.sampling.check();
  static constexpr char programs[2][2] = {};  // greedy or not, with excluded tokens or without
  const Index rows = state.batch();
  detail::GenerationOutput output(state, prompts, options);
  ArenaScope scope(ctx.arena());
  const detail::PackedPrompts packed(prompts);
  extend(ctx, state, Tokens(packed.tokens, packed.lengths));
  if (output.most_left() == 0) return output.take();

  const Matrix<A> logits = state.logits(rows);
  const bool greedy = options.sampling.temperature == 0;
  Drawn* posted = ctx.template pinned_buffer<Drawn>(2 * rows);  // (2, rows), by turns
  const GenerationRows there =
      detail::generation_rows(ctx, state.lengths(), output.left(), prompts, Net::vocabulary, options);
  BatchSampler samplers = detail::batch_sampler(ctx, there, options, posted);
  sample_rows(ctx, samplers, rows, Matrix<const A>(logits), greedy);
  ctx.record_event(0);
  samplers.places = there.offsets.data;
  const GraphKey key{&programs[greedy][samplers.excluded != nullptr],
                     {buffer_.data(), state.data(), logits.data, there.offsets.data},
                     {rows, state.max_length()}};
  const auto step = [&](int turn) {
    ctx.launch_graph(key, {}, [&](const StepInput&) {
      ArenaScope step_scope(ctx.arena());
      advance_rows(ctx, there);
      const Sequences sequences{there.offsets.data, there.starts.data, rows, rows, 1};
      const auto s = Net::template forward<A>(ctx, views_, there.tokens.data, sequences, state.views(), Keep::nothing);
      Net::logits(ctx, views_, Matrix<const A>(s.x), logits);
      sample_rows(ctx, samplers, rows, Matrix<const A>(logits), greedy);
    });
    ctx.record_event(turn);
  };

  const auto end_row = [&](Index row) { ctx.upload(output.left().data() + row, there.left.slice(row, 1)); };
  for (int turn = 0;; turn ^= 1) {
    const bool ahead = !callback && output.most_left() > 1;
    if (ahead) step(turn ^ 1);
    ctx.synchronize_event(turn);
    output.read(posted + turn * rows, callback, end_row);
    if (output.most_left() == 0) return output.take();
    if (!ahead) step(turn ^ 1);
    for (Index row = 0; row < rows; ++row)
      if (detail::item(output.left(), row) > 0) state.advance(row, output.last(row));
  }
}

template <class Net, class T, class Device>
std::vector<std::vector<Token>> Model<Net, T, Device>::generate(
    StateType& state, std::span<const std::vector<Token>> prompts, const GenerationOptions& options,
    const TokenFunction& callback) const requires draws<Device> {
  return generate(this_thread_context<Device>(), state, prompts, options, callback);
}

}  // namespace zamba
