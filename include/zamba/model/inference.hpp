// SPDX-License-Identifier: MIT
// Members of Model: states, the memory that computing takes, and extend; included by model.hpp.
#pragma once

#include <zamba/model.hpp>
#include <zamba/model/parts.hpp>

namespace zamba {

template <class Net, class T, class Device>
auto Model<Net, T, Device>::state_from_bytes(std::span<const std::byte> bytes) const -> StateType {
  StateType state = StateType::from_bytes(bytes);
  check_weights("state_from_bytes", state);
  return state;
}

/// Throws for a state that another model computed, unless its weights are the same; what this one's weights were before
/// a step of training may have computed it.
template <class Net, class T, class Device>
void Model<Net, T, Device>::check_weights(const char* call, const StateType& state) const {
  const WeightsId of = state.weights();
  require(of.model == mark_.model() || of.fingerprint == fingerprint() || state.empty(), call,
          ": the state was computed with other weights: theirs have the fingerprint ", of.fingerprint,
          ", this model's ", fingerprint());
}

template <class Net, class T, class Device>
auto Model<Net, T, Device>::new_state(StateOptions options) const -> StateType {
  try {
    return StateType(options);
  } catch (const OutOfMemory&) {
    if constexpr (by_operators<Net>)
      fail_for_memory("new_state", options, workspace_bytes(options));
    else
      fail_for_memory("new_state", options, 0);
  }
}

template <class Net, class T, class Device>
std::size_t Model<Net, T, Device>::workspace_bytes(StateOptions options, int threads) requires by_operators<Net> {
  StateType::check("workspace_bytes", options);
  threads = DeviceTraits<Device>::threads(threads);
  Views views;
  detail::bind_parameters<Net>(views, [](std::size_t) { return reinterpret_cast<std::byte*>(alignment); });
  const auto scratch = [&](Index tokens, Index longest) {
    return detail::scratch_bytes<Net, T, Device>(views, threads, options, tokens, longest);
  };
  constexpr Index chunk = DeviceTraits<Device>::prefill_chunk;
  const Index most = options.max_length > chunk / options.batch ? chunk : options.batch * options.max_length;
  std::size_t bytes = std::max(scratch(options.batch, 1), scratch(most, most));
  // A way for few tokens may take more than that for many; it ends at a power of two.
  for (Index tokens = 1; tokens < most; tokens *= 2) bytes = std::max(bytes, scratch(tokens, tokens));
  return bytes + detail::checked_bytes(sizeof(A), options.batch, Net::vocabulary);
}

/// Before anything is computed: the scratch, and room for logits of so many rows.
template <class Net, class T, class Device>
auto Model<Net, T, Device>::make_room(Context<Device>& ctx, StateType& state, std::size_t scratch, Index logits) const
    -> Matrix<A> {
  try {
    ctx.arena().reserve(scratch);
    return state.logits(logits);
  } catch (const OutOfMemory&) {
    fail_for_memory("extend", {state.batch(), state.max_length()},
                    scratch + static_cast<std::size_t>(logits * Net::vocabulary) * sizeof(A));
  }
}

template <class Net, class T, class Device>
void Model<Net, T, Device>::fail_for_memory(const char* call, StateOptions options, std::size_t workspace) const {
  const double state =
      detail::state_bytes<Net, T>(static_cast<double>(options.batch), static_cast<double>(options.max_length));
  const std::string numbers = detail::or_out_of_memory(call, [&] {
    std::ostringstream text;
    text << std::fixed << std::setprecision(0)
         << state + static_cast<double>(buffer_.size()) + static_cast<double>(workspace) << " bytes in all, weights "
         << buffer_.size() << " + state " << state << " + workspace " << workspace;
    return text.str();
  });
  detail::throw_error<OutOfMemory>(call, ": out of memory on ", DeviceTraits<Device>::name, ": ", numbers, "; ",
                                   Memory<Device>::free_bytes(), " are free beside what is held already");
}

template <class Net, class T, class Device>
void Model<Net, T, Device>::check(const StateType& state, const Tokens& tokens) const {
  const Index rows = state.batch(), count = static_cast<Index>(tokens.tokens.size());
  require(count > 0, "extend: the prompt is empty, at least one token is needed");
  require(!tokens.lengths.empty() || rows == 1, "extend: a state of ", rows,
          " rows needs the number of tokens of each row");
  require(tokens.lengths.empty() || static_cast<Index>(tokens.lengths.size()) == rows,
          "extend: ", tokens.lengths.size(), " lengths given for a state of ", rows, " rows");
  Index sum = 0;
  for (std::size_t row = 0; row < tokens.lengths.size(); ++row) {
    require(tokens.lengths[row] >= 0 && tokens.lengths[row] <= count, "extend: row ", row, " has length ",
            tokens.lengths[row], ", with ", count, " tokens given");
    sum += tokens.lengths[row];
  }
  require(tokens.lengths.empty() || sum == count, "extend: the lengths add up to ", sum, ", but ", count,
          " tokens were given");
  for (Index row = 0; row < rows; ++row) {
    const Index added = tokens.lengths.empty() ? count : detail::item(tokens.lengths, row);
    require(state.length(row) + added <= state.max_length(), "extend: row ", row, " holds ", state.length(row),
            " positions and would get ", added, " more, over max_length ", state.max_length());
  }
  detail::check_vocabulary(tokens.tokens, Net::vocabulary, "extend", false);
  check_weights("extend", state);
}

template <class Net, class T, class Device>
auto Model<Net, T, Device>::extend(Context<Device>& ctx, StateType& state, const Tokens& tokens,
                                   Positions positions) const -> Matrix<const A> {
  check(state, tokens);
  const Index rows = state.batch(), count = static_cast<Index>(tokens.tokens.size());
  if (count == rows && std::all_of(tokens.lengths.begin(), tokens.lengths.end(), [](Index n) { return n == 1; }))
    return step(ctx, state, tokens.tokens);
  const auto scratch = [&](Index of_tokens) {
    return detail::scratch_bytes<Net, T, Device>(views_, ctx.threads(), {rows, state.max_length()}, of_tokens,
                                                 of_tokens);
  };
  const Index at_once = std::min(count, DeviceTraits<Device>::prefill_chunk), rest = count % at_once;
  const Matrix<A> logits = make_room(ctx, state, std::max(scratch(at_once), rest > 0 ? scratch(rest) : 0),
                                     positions == Positions::all ? count : rows);
  ArenaScope scope(ctx.arena());
  ArenaScope host_scope(ctx.host_arena());
  const detail::ExtendRoom<A> room(ctx, rows, at_once, Net::d_model);
  room.begin(tokens.lengths, count);
  if (positions == Positions::last) ctx.fill(room.last, static_cast<A>(std::numeric_limits<F>::quiet_NaN()));

  const auto compute_chunk = [&] {
    Sequences sequences = room.next_chunk(tokens.tokens.data(), state.lengths(), DeviceTraits<Device>::prefill_chunk);
    ArenaScope chunk_scope(ctx.arena());
    sequences.offsets = ctx.readable(room.offsets.data, rows + 1);
    sequences.starts = ctx.readable(room.starts.data, rows);

    const auto s = Net::template forward<A>(ctx, views_, ctx.readable(room.chunk.data, sequences.tokens), sequences,
                                            state.views(), Keep::nothing);
    for (Index row = 0; row < rows; ++row) {
      const Index begin = room.offsets[row], taken = room.offsets[row + 1] - begin;
      if (taken == 0) continue;
      if (positions == Positions::all)
        Net::logits(ctx, views_, Matrix<const A>(s.x.slice(begin, taken)),
                    logits.slice(room.first[row] + room.done[row], taken));
      else
        ctx.copy(s.x[begin + taken - 1], room.last[row]);
      room.done[row] += taken;
    }
  };
  keeping_state(ctx, state, [&] {
    for (Index computed = 0; computed < count; computed += room.offsets[rows]) compute_chunk();
    if (positions == Positions::last) Net::logits(ctx, views_, Matrix<const A>(room.last), logits);
  });
  state.set_weights(weights());
  for (Index row = 0; row < rows; ++row)
    state.advance(row, tokens.tokens.subspan(static_cast<std::size_t>(room.first[row]),
                                             static_cast<std::size_t>(room.first[row + 1] - room.first[row])));
  return logits;
}

/// compute(); where what it takes is not known before, an error puts the state back.
template <class Net, class T, class Device>
template <class Compute>
void Model<Net, T, Device>::keeping_state(Context<Device>& ctx, StateType& state, Compute&& compute) const {
  if constexpr (by_operators<Net>)
    compute();
  else
    detail::keeping_state<Net, F>(ctx, state.views(), compute);
}

/// One token a row: always the same work on the same memory, so a device may record it.
template <class Net, class T, class Device>
auto Model<Net, T, Device>::step(Context<Device>& ctx, StateType& state, std::span<const Token> tokens) const
    -> Matrix<const A> {
  static constexpr char program = 0;
  const Index rows = state.batch();
  const Matrix<A> logits = make_room(ctx, state, 0, rows);
  const GraphKey key{&program, {buffer_.data(), state.data(), logits.data}, {rows, state.max_length()}};
  const bool warm = ctx.is_warm(key);
  if (!warm) {
    const StateOptions options{rows, state.max_length()};
    make_room(ctx, state, detail::scratch_bytes<Net, T, Device>(views_, ctx.threads(), options, rows, 1), rows);
  }
  ArenaScope scope(ctx.arena());
  ArenaScope host_scope(ctx.host_arena());
  const Vector<Index> offsets = ctx.host_arena().template tensor<Index>(rows + 1);
  std::iota(offsets.data, offsets.data + rows + 1, Index{0});
  const StepInput input{std::span<const Index>(offsets.data, tokens.size() + 1), state.lengths(), tokens};
  const auto run = [&] {
    ctx.launch_graph(key, input, [&](const StepInput& there) {
      ArenaScope step_scope(ctx.arena());
      const Sequences sequences{there.offsets.data(), there.starts.data(), rows, rows, 1};
      const auto s =
          Net::template forward<A>(ctx, views_, there.tokens.data(), sequences, state.views(), Keep::nothing);
      Net::logits(ctx, views_, Matrix<const A>(s.x), logits);
    });
  };
  if (warm)
    run();  // which takes no memory
  else
    keeping_state(ctx, state, run);
  state.set_weights(weights());
  for (Index row = 0; row < rows; ++row) state.advance(row, tokens.subspan(static_cast<std::size_t>(row), 1));
  return logits;
}

template <class Net, class T, class Device>
auto Model<Net, T, Device>::extend(StateType& state, const Tokens& tokens, Positions positions) const
    -> Matrix<const A> {
  return extend(this_thread_context<Device>(), state, tokens, positions);
}

}  // namespace zamba
