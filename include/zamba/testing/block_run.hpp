// SPDX-License-Identifier: MIT
// BlockRun<B, T>: one block, with weights and caches stored as T, run forward and backward on vectors of its own; and
// dry_bytes<B>, its dry run.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <zamba/dry_run.hpp>
#include <zamba/model.hpp>
#include <zamba/shared_use.hpp>

namespace zamba::testing::detail {

/// Everything a pass starts from, and the gradient of each: parameters at the offsets of their entries, x, t, and the
/// state before the pass, tensor by tensor.
struct BlockPoint {
  std::vector<double> parameters, x, t, state;
};

struct BlockResult {
  std::vector<double> out, state;
};

/// The rows of a pass: how many tokens each has, and how many are in its state already.
struct BlockRows {
  std::vector<Index> lengths, starts;

  Index tokens() const { return std::accumulate(lengths.begin(), lengths.end(), Index{0}); }
};

/// What a pass is given beside its point.
struct BlockManner {
  Keep keep = Keep::nothing;
  bool in_place = false;     // out is the memory of x
  bool second_input = true;  // t and d_t
  bool state = true;
  bool state_gradient = true;
  double held = 0;           // by what is added to, before; it is taken off the result
  double assigned_held = 0;  // by what is assigned
};

/// `values` as they are in memory of type Element, and back.
template <class Element>
std::vector<Element> stored_as(const std::vector<double>& values, std::size_t first, std::size_t count) {
  std::vector<Element> stored(count);
  for (std::size_t i = 0; i < count; ++i)
    stored[i] = static_cast<Element>(static_cast<compute_t<Element>>(values[first + i]));
  return stored;
}
template <class Element>
double value_of(const Element& element) {
  return static_cast<double>(static_cast<compute_t<Element>>(element));
}

template <class B, class T = double>
class BlockRun {
 public:
  static constexpr Index d = B::d_model;
  static constexpr bool shared = zamba::detail::SaysShared<B>;
  using F = compute_t<T>;
  using Parameters = typename B::template Parameters<const T, const F>;
  using Gradients = typename B::template Parameters<F, F>;
  using State = typename B::template State<T, F>;
  using StateGradient = typename B::template State<F, F>;

  /// Of so many rows, with room for so many positions each.
  BlockRun(Index rows, Index room) : rows_(rows), room_(room), ctx_(1) {
    entries_ = zamba::detail::list_parameters<B, T>();
    if (!entries_.empty()) {
      size_ = entries_.back().offset + entries_.back().size;
      weights_.resize(entries_.back().byte_offset + static_cast<std::size_t>(entries_.back().size) * sizeof(F));
    }
    State state;
    zamba::visit_state<B>(state, [&](const Name&, auto&, Index per_row, Index width) {
      const Index count = per_row == per_position ? room_ : per_row;
      has_cache_ |= per_row == per_position;
      for (Index row = 0; row < rows_; ++row)
        for (Index i = 0; i < count * width; ++i) state_rows_.push_back(row);
    });
  }

  const std::vector<ParameterEntry>& entries() const { return entries_; }
  /// The row of each element of a state.
  const std::vector<Index>& state_rows() const { return state_rows_; }
  bool has_cache() const { return has_cache_; }

  /// Random values, the state's NaN: nothing was written yet.
  BlockPoint random_point(Index tokens) const {
    Random random(Seed{20}, 0);
    const auto normal = [&](Index n) {
      std::vector<double> values(static_cast<std::size_t>(n));
      for (double& value : values) value = random.normal();
      return values;
    };
    BlockPoint point{normal(size_), normal(tokens * d), normal(tokens * d), unwritten_state()};
    for (double& value : point.parameters) value *= 0.4;
    return point;
  }
  std::vector<double> unwritten_state() const {
    return std::vector<double>(state_rows_.size(), std::numeric_limits<double>::quiet_NaN());
  }

  /// The same with every value as it is stored.
  BlockPoint stored(BlockPoint point) const {
    const auto round = [](std::vector<double>& values, Index first, Index count, auto zero) {
      const auto rounded =
          stored_as<decltype(zero)>(values, static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      std::transform(rounded.begin(), rounded.end(), values.begin() + first,
                     [](const auto& value) { return value_of(value); });
    };
    for (const ParameterEntry& entry : entries_) {
      if (entry.precise)
        round(point.parameters, entry.offset, entry.size, F{});
      else
        round(point.parameters, entry.offset, entry.size, T{});
    }
    for (auto* values : {&point.x, &point.t}) round(*values, 0, static_cast<Index>(values->size()), F{});
    return point;
  }

  /// Whether a forward pass takes no more than so many bytes of scratch.
  bool fits(const BlockPoint& point, const BlockRows& rows, std::size_t bytes) {
    ctx_ = Context<cpu>(1);
    ctx_.arena().reserve(bytes);
    const auto generation = ctx_.arena().generation();
    ArenaScope scope(ctx_.arena());
    load(point, rows, {});
    run({});
    return ctx_.arena().generation() == generation;
  }

  /// Appends the tokens to the rows; the state is rewritten.
  BlockResult forward(const BlockPoint& point, const BlockRows& rows, const BlockManner& manner = {}) {
    ArenaScope scope(ctx_.arena());
    soil_scratch(1 << 13);
    load(point, rows, manner);
    run(manner);
    return {to_double(manner.in_place ? x_ : out_), read_state<State>(state_)};
  }

  /// Gradients of sum(out * d_out) + sum(state * d_state): of every part of the point.
  BlockPoint gradients(const BlockPoint& point, const BlockRows& rows, const BlockResult& cotangent,
                       const BlockManner& manner = {Keep::everything}) {
    ArenaScope scope(ctx_.arena());
    soil_scratch(1 << 17);
    load(point, rows, manner);
    const auto saved = run(manner);
    std::vector<F> d_parameters(static_cast<std::size_t>(size_), static_cast<F>(manner.held)),
        d_out = stored_as<F>(cotangent.out, 0, cotangent.out.size()), d_x(x_.size(), static_cast<F>(manner.held)),
        d_t(t_.size(), static_cast<F>(shared ? manner.held : manner.assigned_held));
    Gradients d_p;
    zamba::detail::bind_parameters<B>(
        d_p, [&](std::size_t i) { return reinterpret_cast<std::byte*>(d_parameters.data() + entries_[i].offset); });
    auto d_state = write_state<StateGradient>(cotangent.state);
    const StateGradient d_views =
        manner.state && manner.state_gradient ? views_of<StateGradient>(d_state) : StateGradient{};
    const Matrix<F> of_out(d_out.data(), sequences_.tokens, d), of_x(d_x.data(), sequences_.tokens, d),
        of_t = second(d_t, manner);
    const ResidualIO<F> io{stream(manner).x, stream(manner).t, {}};
    if constexpr (shared)
      B::backward(ctx_, parameters_, d_p, saved, io, of_out, of_x, of_t, sequences_, state_views(manner), d_views);
    else
      B::backward(ctx_, parameters_, d_p, saved, io, of_out, of_t, sequences_, state_views(manner), d_views);
    BlockPoint gradient{to_double(d_parameters), to_double(shared ? d_x : d_out), to_double(d_t),
                        read_state<StateGradient>(d_state)};
    for (double& value : gradient.parameters) value -= manner.held;
    if (shared)
      for (auto* values : {&gradient.x, &gradient.t})
        for (double& value : *values) value -= manner.held;
    return gradient;
  }

 private:
  using Bytes = std::vector<std::vector<std::byte>>;

  static std::vector<double> to_double(const std::vector<F>& values) { return {values.begin(), values.end()}; }

  /// What scratch holds before it is written is nobody's business.
  void soil_scratch(Index count) {
    ArenaScope scope(ctx_.arena());
    ctx_.fill(ctx_.arena().template tensor<double>(count), std::numeric_limits<double>::quiet_NaN());
  }

  Matrix<F> second(std::vector<F>& t, const BlockManner& manner) const {
    return manner.second_input ? Matrix<F>(t.data(), sequences_.tokens, d) : Matrix<F>{};
  }
  ResidualIO<F> stream(const BlockManner& manner) {
    return {Matrix<F>(x_.data(), sequences_.tokens, d), second(t_, manner),
            Matrix<F>(manner.in_place ? x_.data() : out_.data(), sequences_.tokens, d)};
  }
  State state_views(const BlockManner& manner) { return manner.state ? views_of<State>(state_) : State{}; }

  void load(const BlockPoint& point, const BlockRows& rows, const BlockManner& manner) {
    offsets_.assign(1, 0);
    for (const Index length : rows.lengths) offsets_.push_back(offsets_.back() + length);
    starts_ = rows.starts;
    sequences_ = {offsets_.data(), manner.state ? starts_.data() : nullptr, rows_, offsets_.back(),
                  *std::max_element(rows.lengths.begin(), rows.lengths.end())};
    x_ = stored_as<F>(point.x, 0, point.x.size());
    t_ = stored_as<F>(point.t, 0, point.t.size());
    out_.assign(x_.size(), std::numeric_limits<F>::quiet_NaN());
    state_ = write_state<State>(point.state);
    for (const ParameterEntry& entry : entries_) {
      const auto copy = [&](auto zero) {
        const auto stored = stored_as<decltype(zero)>(point.parameters, static_cast<std::size_t>(entry.offset),
                                                      static_cast<std::size_t>(entry.size));
        std::memcpy(weights_.data() + entry.byte_offset, stored.data(), stored.size() * sizeof zero);
      };
      if (entry.precise)
        copy(F{});
      else
        copy(T{});
    }
    zamba::detail::bind_parameters<B>(
        parameters_, [&](std::size_t i) -> const std::byte* { return weights_.data() + entries_[i].byte_offset; });
  }
  auto run(const BlockManner& manner) {
    return B::forward(ctx_, parameters_, stream(manner), sequences_, state_views(manner), manner.keep);
  }

  template <class Views>
  Bytes write_state(const std::vector<double>& values) const {
    Bytes tensors;
    std::size_t at = 0;
    Views views;
    zamba::visit_state<B>(views, [&]<class Element>(const Name&, Tensor<Element, 3>&, Index per_row, Index width) {
      const auto stored = stored_as<Element>(values, at, elements(per_row, width));
      const auto* bytes = reinterpret_cast<const std::byte*>(stored.data());
      tensors.emplace_back(bytes, bytes + stored.size() * sizeof(Element));
      at += stored.size();
    });
    return tensors;
  }
  template <class Views>
  std::vector<double> read_state(Bytes& tensors) const {
    std::vector<double> values;
    Views views = views_of<Views>(tensors);
    zamba::visit_state<B>(views, [&](const Name&, auto& tensor, Index, Index) {
      for (Index i = 0; i < tensor.size(); ++i) values.push_back(value_of(tensor.data[i]));
    });
    return values;
  }
  template <class Views>
  Views views_of(Bytes& tensors) const {
    Views views;
    std::size_t i = 0;
    zamba::visit_state<B>(views,
                          [&]<class Element>(const Name&, Tensor<Element, 3>& tensor, Index per_row, Index width) {
                            tensor = {reinterpret_cast<Element*>(tensors[i++].data()), rows_,
                                      per_row == per_position ? room_ : per_row, width};
                          });
    return views;
  }
  std::size_t elements(Index per_row, Index width) const {
    return static_cast<std::size_t>(rows_ * (per_row == per_position ? room_ : per_row) * width);
  }

  Index rows_, room_, size_ = 0;
  bool has_cache_ = false;
  Context<cpu> ctx_;
  std::vector<ParameterEntry> entries_;
  std::vector<std::byte> weights_;
  std::vector<Index> state_rows_, offsets_, starts_;
  std::vector<F> x_, t_, out_;
  Bytes state_;
  Parameters parameters_;
  Sequences sequences_;
};

/// Scratch of a forward pass in float64, as its dry run tells.
template <class B>
std::size_t dry_bytes(Index rows, Index tokens, Index room) {
  const auto nowhere = [] { return reinterpret_cast<double*>(alignment); };
  Context<zamba::detail::DryRun<cpu>> ctx(1);
  typename B::template Parameters<const double, const double> parameters;
  zamba::detail::bind_parameters<B>(parameters, [](std::size_t) { return reinterpret_cast<std::byte*>(alignment); });
  typename B::template State<double, double> state;
  zamba::visit_state<B>(state, [&](const Name&, auto& tensor, Index per_row, Index width) {
    tensor = {nowhere(), rows, per_row == per_position ? room : per_row, width};
  });
  const auto* numbers = reinterpret_cast<const Index*>(alignment);
  const Matrix<double> stream(nowhere(), tokens, B::d_model);
  B::forward(ctx, parameters, ResidualIO<double>{stream, stream, stream},
             Sequences{numbers, numbers, rows, tokens, tokens}, state, Keep::nothing);
  return ctx.arena().peak();
}

}  // namespace zamba::testing::detail
