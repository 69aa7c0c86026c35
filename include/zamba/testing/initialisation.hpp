// SPDX-License-Identifier: MIT
// initialisation<B>(): checks that no part of a fresh block is dead, in float64 on the CPU.
//
// The block's parameters are drawn as a model draws them, its input as a fresh embedding. Then
//
//   - what the block adds to its input is no trifle beside it
//   - a small change of each parameter, relative to its size, shows in what the block adds
//   - each parameter gets a gradient that is no trifle beside those of all parameters
//   - what each tensor of the state holds after 64 tokens shows in the 16 that follow
//
// A shared block is checked as one use of it, with the parameters of that use. A parameter that begins at zero on
// purpose, and multiplies others, leaves those dead.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <zamba/model.hpp>
#include <zamba/shared_use.hpp>
#include <zamba/testing/report.hpp>

namespace zamba::testing {

namespace detail {

inline double rms_of(std::span<const double> values) {
  return std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0) /
                   static_cast<double>(values.size()));
}

/// A block as a model begins with it, and one row of tokens.
template <class B>
class FreshBlock {
 public:
  static constexpr bool shared = requires { requires B::shared; };
  static constexpr Index d = B::d_model, past = 64, tokens = past + 16;

  FreshBlock() : entries_(zamba::detail::list_parameters<B, double>()), x_(stream(1)), t_(stream(2)) {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const auto values = zamba::detail::initial_values(entries_[i], i, Seed{20});
      parameters_.resize(static_cast<std::size_t>(entries_[i].offset));
      parameters_.insert(parameters_.end(), values.begin(), values.end());
    }
    typename B::template State<double, double> state;
    zamba::visit_state<B>(state, [&](const Name& name, auto&, Index rows, Index width) {
      state_.push_back({name.str(), (rows == per_position ? tokens : rows) * width});
    });
  }

  const std::vector<ParameterEntry>& entries() const { return entries_; }
  const std::vector<double>& input() const { return x_; }

  /// A tensor of the state, of zeros.
  struct StatePart {
    std::string name;
    Index size;
    std::vector<double> values = std::vector<double>(static_cast<std::size_t>(size));
  };
  std::vector<StatePart> new_state() const { return state_; }

  /// What the block adds to tokens [first, end), after `state`, which is rewritten.
  std::vector<double> added(Index first, Index end, std::vector<StatePart>& state) {
    ArenaScope scope(ctx_.arena());
    std::vector<double> out(static_cast<std::size_t>((end - first) * d));
    const std::vector<Index> offsets{0, end - first}, starts{first};
    B::forward(ctx_, bound<const double>(parameters_), stream(first, end, out), sequences(offsets, starts),
               bound(state), Keep::nothing);
    if (!shared)
      for (std::size_t i = 0; i < out.size(); ++i) out[i] -= x_[static_cast<std::size_t>(first * d) + i];
    return out;
  }
  /// The same for all tokens, after parameter `entry` has changed by about `change` of its size; by `change` itself
  /// where it is zero.
  std::vector<double> added_after_change(const ParameterEntry& entry, double change) {
    const auto begin = parameters_.begin() + entry.offset, end = begin + entry.size;
    const std::vector<double> kept(begin, end);
    const double size = rms_of(kept), step = change * (size > 0 ? size : 1);
    Random random(Seed{21}, 4);
    for (auto at = begin; at != end; ++at) *at += step * random.normal();
    auto state = new_state();
    auto result = added(0, tokens, state);
    std::copy(kept.begin(), kept.end(), begin);
    return result;
  }

  /// Gradients of all parameters, at the offsets of their entries, for a random gradient of the output.
  std::vector<double> gradients() {
    ArenaScope scope(ctx_.arena());
    std::vector<double> out(x_.size()), d_out = stream(3), d_x(x_.size()), d_t(x_.size()), result(parameters_.size());
    const std::vector<Index> offsets{0, tokens}, starts{0};
    const auto p = bound<const double>(parameters_);
    const auto d_p = bound<double>(result);
    const typename B::template State<double, double> none;
    const auto io = stream(0, tokens, out);
    const auto rows = sequences(offsets, starts);
    const auto matrix = [](std::vector<double>& values) { return Matrix<double>(values.data(), tokens, d); };
    const auto saved = B::forward(ctx_, p, io, rows, none, Keep::everything);
    if constexpr (shared)
      B::backward(ctx_, p, d_p, saved, io, Matrix<const double>(matrix(d_out)), matrix(d_x), matrix(d_t), rows, none,
                  none);
    else
      B::backward(ctx_, p, d_p, saved, io, matrix(d_out), matrix(d_t), rows, none, none);
    return result;
  }

 private:
  static std::vector<double> stream(std::uint64_t number) {
    Random random(Seed{21}, number);
    std::vector<double> values(static_cast<std::size_t>(tokens * d));
    for (double& value : values) value = embedding_std * random.normal();
    return values;
  }
  ResidualIO<double> stream(Index first, Index end, std::vector<double>& out) const {
    const Index count = end - first;
    return {{x_.data() + first * d, count, d}, {t_.data() + first * d, count, d}, {out.data(), count, d}};
  }
  static Sequences sequences(const std::vector<Index>& offsets, const std::vector<Index>& starts) {
    return {offsets.data(), starts.data(), 1, offsets[1], offsets[1]};
  }

  template <class Element, class Values>
  typename B::template Parameters<Element, Element> bound(Values& values) const {
    typename B::template Parameters<Element, Element> parameters;
    using Byte = std::conditional_t<std::is_const_v<Element>, const std::byte, std::byte>;
    zamba::detail::bind_parameters<B>(
        parameters, [&](std::size_t i) { return reinterpret_cast<Byte*>(values.data() + entries_[i].offset); });
    return parameters;
  }
  static typename B::template State<double, double> bound(std::vector<StatePart>& parts) {
    typename B::template State<double, double> state;
    std::size_t i = 0;
    zamba::visit_state<B>(state, [&](const Name&, auto& tensor, Index rows, Index width) {
      tensor = {parts[i++].values.data(), 1, rows == per_position ? tokens : rows, width};
    });
    return state;
  }

  Context<cpu> ctx_;
  std::vector<ParameterEntry> entries_;
  std::vector<double> parameters_, x_, t_;
  std::vector<StatePart> state_;
};

}  // namespace detail

/// Checks a block as listed at the top of this file. Each figure says how many times weaker a part is than the whole.
/// Takes some 20 forward passes over 80 tokens.
template <class Given>
Report initialisation() {
  using B = std::conditional_t<detail::FreshBlock<Given>::shared, SharedUse<Given>, Given>;
  // Mean gradients of a batch have elements of about 1e-3: those 1e5 times smaller drown in AdamW's epsilon of 1e-8.
  // Of the library's blocks, from d_model 2 to 4096, the weakest part, Mamba's dt_proj, is 2.2e4 times weaker, in a
  // stack of 24 layers 3.2e4 times. With normal(0.02) in place of fan_in the state of a Mamba of d_model 64 is 1.5e7
  // times weaker, of a Mamba-2 4e5 times.
  constexpr double weakest = 1e5;
  constexpr double weakest_whole = 100;  // Mamba adds more than its input; with normal(0.02), at 64, a 330th of it
  constexpr double change = 1e-3;        // as good as linear, and far above rounding
  const char* unit = "times weaker than the whole";
  Report report("initialisation");
  detail::FreshBlock<B> block;

  auto state = block.new_state();
  const auto whole = block.added(0, block.tokens, state);
  report.add("what is added to the input", detail::rms_of(block.input()) / detail::rms_of(whole), weakest_whole,
             "times the input is larger");

  const auto gradients = block.gradients();
  double squares = 0;
  for (const double gradient : gradients) squares += gradient * gradient;
  const double usual = std::sqrt(squares / static_cast<double>(parameter_count<B>));
  for (const ParameterEntry& entry : block.entries()) {
    const auto changed = block.added_after_change(entry, change);
    report.add(entry.name + ": output", change / relative_error(changed, whole), weakest, unit);
    const auto first = static_cast<std::size_t>(entry.offset), count = static_cast<std::size_t>(entry.size);
    report.add(entry.name + ": gradient", usual / detail::rms_of(std::span(gradients).subspan(first, count)), weakest,
               unit);
  }

  auto past = block.new_state();
  block.added(0, block.past, past);
  const auto after = [&](auto memory) { return block.added(block.past, block.tokens, memory); };
  const auto remembered = after(past);
  for (std::size_t i = 0; i < past.size(); ++i) {
    auto forgotten = past;
    std::fill(forgotten[i].values.begin(), forgotten[i].values.end(), 0);
    report.add("state " + past[i].name + ": output", 1 / relative_error(after(forgotten), remembered), weakest, unit);
  }
  return report;
}

}  // namespace zamba::testing
