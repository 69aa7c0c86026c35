// SPDX-License-Identifier: MIT
// Members of Model: losses and their gradients; included by model.hpp.
#pragma once

#include <zamba/model.hpp>
#include <zamba/model/parts.hpp>
#include <zamba/ops/adamw_step.hpp>

namespace zamba {

template <class Net, class T, class Device>
auto Model<Net, T, Device>::new_state_gradients(const StateType& state) const -> StateGradients {
  StateGradients gradients({state.batch(), state.max_length()});
  gradients.zero();
  return gradients;
}

template <class Net, class T, class Device>
void Model<Net, T, Device>::check(const TrainingBatch& batch, const StateType* state,
                                  const StateGradients* d_state) const {
  const Index count = static_cast<Index>(batch.tokens.size());
  require(count > 0, "loss: the batch is empty");
  require(batch.targets.size() == batch.tokens.size(), "loss: ", batch.tokens.size(), " tokens but ",
          batch.targets.size(), " targets");
  require(batch.offsets.size() >= 2 && batch.offsets.front() == 0 && batch.offsets.back() == count,
          "loss: the offsets of documents must run from 0 to the number of tokens, ", count);
  for (std::size_t i = 1; i < batch.offsets.size(); ++i)
    require(batch.offsets[i] >= batch.offsets[i - 1], "loss: offset ", i, " is ", batch.offsets[i],
            ", before the previous one, ", batch.offsets[i - 1]);
  if (state) {
    const Index rows = static_cast<Index>(batch.offsets.size()) - 1;
    require(state->batch() == rows, "loss: the batch holds ", rows, " documents, the state ", state->batch(), " rows");
    for (Index row = 0; row < rows; ++row) {
      const Index added = detail::item(batch.offsets, row + 1) - detail::item(batch.offsets, row);
      require(state->length(row) + added <= state->max_length(), "loss: row ", row, " holds ", state->length(row),
              " positions and would get ", added, " more, over max_length ", state->max_length());
    }
  }
  require(!d_state || (state && d_state->batch() == state->batch() && d_state->max_length() == state->max_length()),
          "loss: gradients of a state need that state, of the same batch and max_length");
  require(!d_state || static_cast<const void*>(d_state) != state,
          "loss: the gradients of a state are the state itself");
  detail::check_vocabulary(batch.tokens, Net::vocabulary, "loss", false);
  detail::check_vocabulary(batch.targets, Net::vocabulary, "loss: targets", true);
}

namespace detail {

/// The documents of a batch, as the device reads them.
template <class Device, class StateType>
Sequences sequences_of(Context<Device>& ctx, const TrainingBatch& batch, const StateType* state) {
  const Index rows = static_cast<Index>(batch.offsets.size()) - 1;
  Sequences sequences{ctx.readable(batch.offsets.data(), rows + 1), nullptr, rows, batch.offsets.back(), 0};
  for (Index row = 0; row < rows; ++row)
    sequences.longest =
        std::max(sequences.longest, detail::item(batch.offsets, row + 1) - detail::item(batch.offsets, row));
  if (state) {
    auto starts = ctx.host_arena().template tensor<Index>(rows);
    std::copy_n(state->lengths().data(), rows, starts.data);
    sequences.starts = ctx.readable(starts.data, rows);
  }
  return sequences;
}

template <class StateType>
void advance_all(StateType& state, const TrainingBatch& batch) {
  for (Index row = 0; row < state.batch(); ++row)
    state.advance(row, batch.tokens.subspan(static_cast<std::size_t>(detail::item(batch.offsets, row)),
                                            static_cast<std::size_t>(detail::item(batch.offsets, row + 1) -
                                                                     detail::item(batch.offsets, row))));
}

}  // namespace detail

namespace detail {

/// Scratch of loss_and_gradients: what forward keeps, and the most that is taken at once.
struct PassBytes {
  std::size_t kept = 0, most = 0;
};

/// Of `tokens` tokens in so many documents, without states; both passes are run dry.
template <class Net, class T, class Device, class Views>
PassBytes pass_bytes(const Views& parameters, int threads, Index documents, Index tokens, Index longest, Keep keep) {
  using F = compute_t<T>;
  using A = activation_t<T, Device>;
  Context<DryRun<Device>> ctx(threads);
  const auto offsets = ctx.host_arena().template tensor<Index>(documents + 1);
  const auto ids = ctx.host_arena().template tensor<Token>(tokens);
  const Sequences sequences{ctx.readable(offsets.data, documents + 1), nullptr, documents, tokens, longest};
  const Token* const inputs = ctx.readable(ids.data, tokens);
  const Token* const targets = ctx.readable(ids.data, tokens);
  ctx.arena().template tensor<LossSum>(1);
  typename Net::template Parameters<F, F> gradients;
  bind_parameters<Net>(gradients, [](std::size_t) { return reinterpret_cast<std::byte*>(alignment); });
  const typename Net::template State<cache_t<T>, F> no_state;
  const typename Net::template State<F, F> no_gradients;
  PassBytes bytes;
  const auto saved = Net::template forward<A>(ctx, parameters, inputs, sequences, no_state, keep);
  bytes.kept = ctx.arena().mark();
  Net::backward(ctx, parameters, gradients, saved, inputs, targets, 1.0, 0.0, sequences, no_state, no_gradients,
                nullptr);
  bytes.most = ctx.arena().peak();
  return bytes;
}

/// What a pass over so many tokens and the step of AdamW after it take.
template <class Net, class T, class Device, class Views>
TrainingBytes training_bytes(const Views& parameters, const std::vector<ParameterEntry>& entries, int threads,
                             Index documents, Index tokens, Index longest, Keep keep) {
  using F = compute_t<T>;
  const ParameterEntry& last = entries.back();
  const Index elements = last.offset + last.size;
  const auto pass = pass_bytes<Net, T, Device>(parameters, threads, documents, tokens, longest, keep);
  Context<DryRun<Device>> ctx(threads);
  sum_of_squares(ctx, Vector<const F>(reinterpret_cast<const F*>(alignment), elements), nullptr);
  TrainingBytes bytes;
  bytes.weights = last.byte_offset + align_up(last.bytes);
  bytes.gradients = static_cast<std::size_t>(elements) * sizeof(F);
  bytes.moments = adamw_state_bytes<weight_t<T>, F>(elements);
  bytes.activations = pass.kept;
  bytes.workspace = std::max(pass.most, ctx.arena().peak()) - pass.kept;
  return bytes;
}

/// Before anything is computed: all that both passes over a batch take beside states and `taken` bytes, in one block of
/// the arena.
template <class Net, class T, class Device, class Views>
void reserve_for_training(Context<Device>& ctx, const Views& parameters, const std::vector<ParameterEntry>& entries,
                          const TrainingBatch& batch, Keep keep, std::size_t taken) {
  if constexpr (by_operators<Net>) {
    Index longest = 0;
    for (std::size_t i = 1; i < batch.offsets.size(); ++i)
      longest = std::max(longest, batch.offsets[i] - batch.offsets[i - 1]);
    const TrainingBytes bytes =
        training_bytes<Net, T, Device>(parameters, entries, ctx.threads(), static_cast<Index>(batch.offsets.size()) - 1,
                                       batch.offsets.back(), longest, keep);
    try {
      constexpr std::size_t least = 1 << 20;  // so that batches of small models do not differ
      ctx.arena().reserve(std::max(bytes.activations + bytes.workspace, least) - taken);
    } catch (const OutOfMemory&) {
      throw_error<OutOfMemory>("loss_and_gradients: out of memory on ", DeviceTraits<Device>::name, ": ", bytes.total(),
                               " bytes in all, weights ", bytes.weights, " + gradients ", bytes.gradients,
                               " + moments ", bytes.moments, " + activations ", bytes.activations, " + workspace ",
                               bytes.workspace, "; ", Memory<Device>::free_bytes(),
                               " are free beside what is held already");
    }
  }
}

}  // namespace detail

template <class Net, class T, class Device>
TrainingBytes Model<Net, T, Device>::training_bytes(const TrainingShape& shape,
                                                    int threads) requires(trains<Device>&& by_operators<Net>) {
  require(shape.rows > 0 && shape.length > 0, "training_bytes: rows and length must be positive, got ", shape.rows,
          " and ", shape.length);
  Views views;
  detail::bind_parameters<Net>(views, [](std::size_t) { return reinterpret_cast<std::byte*>(alignment); });
  return detail::training_bytes<Net, T, Device>(views, detail::list_parameters<Net, T>(),
                                                DeviceTraits<Device>::threads(threads), shape.rows,
                                                shape.rows * shape.length, shape.length, shape.keep);
}

template <class Net, class T, class Device>
LossSum Model<Net, T, Device>::loss(Context<Device>& ctx, const TrainingBatch& batch,
                                    StateType* state) const requires trains<Device> {
  check(batch, state, nullptr);
  ArenaScope scope(ctx.arena());
  ArenaScope host_scope(ctx.host_arena());
  const Sequences sequences = detail::sequences_of(ctx, batch, state);
  const Token* tokens = ctx.readable(batch.tokens.data(), sequences.tokens);
  const Token* targets = ctx.readable(batch.targets.data(), sequences.tokens);
  const auto compute = [&](const typename StateType::Views& views) {
    const auto s = Net::template forward<A>(ctx, views_, tokens, sequences, views, Keep::nothing);
    return detail::read_loss(ctx,
                             [&](LossSum* total) { Net::loss(ctx, views_, Matrix<const A>(s.x), targets, total); });
  };
  if (!state) return compute({});
  const LossSum sum = detail::keeping_state<Net, F>(ctx, state->views(), [&] { return compute(state->views()); });
  state->set_weights(weights());
  detail::advance_all(*state, batch);
  return sum;
}

template <class Net, class T, class Device>
LossSum Model<Net, T, Device>::loss(const TrainingBatch& batch, StateType* state) const requires trains<Device> {
  return loss(this_thread_context<Device>(), batch, state);
}

template <class Net, class T, class Device>
void Model<Net, T, Device>::loss_and_gradients(Context<Device>& ctx, const TrainingBatch& batch,
                                               GradientsType& gradients, const GradientOptions& options,
                                               LossSum* total) const requires trains<Device> {
  check(batch, options.state, options.d_state);
  const Keep keep = options.recompute ? Keep::layer_inputs : options.keep;
  require(keep != Keep::nothing, "loss_and_gradients: Keep::nothing leaves no way back; layer_inputs is the least");
  detail::reserve_for_training<Net, T>(ctx, views_, entries_, batch, keep, align_up(sizeof(LossSum)));
  ArenaScope scope(ctx.arena());
  ArenaScope host_scope(ctx.host_arena());
  const Sequences sequences = detail::sequences_of(ctx, batch, options.state);
  const Token* tokens = ctx.readable(batch.tokens.data(), sequences.tokens);
  const Token* targets = ctx.readable(batch.targets.data(), sequences.tokens);
  const auto d_views = options.d_state ? options.d_state->views() : typename StateGradients::Views{};
  double scale = options.scale;
  if (scale == 0) {
    const auto wanted = std::count_if(batch.targets.begin(), batch.targets.end(), [](Token t) { return t >= 0; });
    scale = 1 / static_cast<double>(std::max<Index>(wanted, 1));
  }
  const auto compute = [&](const typename StateType::Views& views) {
    const auto saved = Net::template forward<A>(ctx, views_, tokens, sequences, views, keep);
    Net::backward(ctx, views_, gradients.views(), saved, tokens, targets, scale, options.z_loss, sequences, views,
                  d_views, total);
  };
  if (!options.state) return compute({});
  detail::keeping_state<Net, F>(ctx, options.state->views(), [&] { compute(options.state->views()); });
  options.state->set_weights(weights());
  detail::advance_all(*options.state, batch);
}

template <class Net, class T, class Device>
LossSum Model<Net, T, Device>::loss_and_gradients(Context<Device>& ctx, const TrainingBatch& batch,
                                                  GradientsType& gradients,
                                                  const GradientOptions& options) const requires trains<Device> {
  check(batch, options.state, options.d_state);
  const Keep keep = options.recompute ? Keep::layer_inputs : options.keep;
  detail::reserve_for_training<Net, T>(ctx, views_, entries_, batch, keep, 0);  // with the loss, which is taken first
  return detail::read_loss(ctx, [&](LossSum* total) { loss_and_gradients(ctx, batch, gradients, options, total); });
}

template <class Net, class T, class Device>
LossSum Model<Net, T, Device>::loss_and_gradients(const TrainingBatch& batch,
                                                  GradientsType& gradients) const requires trains<Device> {
  return loss_and_gradients(this_thread_context<Device>(), batch, gradients, {});
}

}  // namespace zamba
