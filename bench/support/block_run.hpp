// SPDX-License-Identifier: MIT
// A block of the library on data of its own, for the benchmarks of blocks.
#pragma once

#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/model.hpp>

#include "ceilings.hpp"

namespace zamba::bench {

/// Block B in float: `tokens` positions of one row, which has `past` positions in its state.
template <class B>
class BlockRun {
 public:
  static constexpr bool shared = requires { requires B::shared; };

  BlockRun(Index tokens, Index past)
      : tokens_(tokens), entries_(zamba::detail::list_parameters<B, float>()), offsets_{0, tokens}, starts_{past} {
    const Index size = entries_.back().offset + entries_.back().size;
    weights_.resize(static_cast<std::size_t>(size));
    gradients_.resize(weights_.size());
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const auto values = zamba::detail::initial_values(entries_[i], i, Seed{1});
      std::transform(values.begin(), values.end(), weights_.begin() + entries_[i].offset,
                     [](double value) { return static_cast<float>(value); });
    }
    bind(p_, weights_.data());
    bind(d_p_, gradients_.data());
    Index state_size = 0;
    visit_state<B>(state_, [&](const Name&, auto&, Index rows, Index width) {
      state_size += (rows == per_position ? past + tokens : rows) * width;
    });
    state_values_.assign(static_cast<std::size_t>(state_size), 0.01f);
    Index at = 0;
    visit_state<B>(state_, [&](const Name&, auto& tensor, Index rows, Index width) {
      const Index count = rows == per_position ? past + tokens : rows;
      tensor = {state_values_.data() + at, 1, count, width};
      at += count * width;
    });
    Random random(Seed{2});
    for (auto* values : {&x_, &t_, &out_, &d_, &d_x_, &d_t_}) {
      values->resize(static_cast<std::size_t>(tokens * B::d_model));
      for (float& value : *values) value = static_cast<float>(random.normal());
    }
  }

  Context<cpu>& ctx() { return ctx_; }
  auto forward(Keep keep) { return B::forward(ctx_, p_, stream(), sequences(), state_, keep); }
  /// Of a forward pass with Keep::everything.
  template <class Saved>
  void backward(const Saved& saved) {
    const typename B::template State<float, float> none;
    if constexpr (shared)
      B::backward(ctx_, p_, d_p_, saved, stream(), Matrix<const float>(matrix(d_)), matrix(d_x_), matrix(d_t_),
                  sequences(), none, none);
    else
      B::backward(ctx_, p_, d_p_, saved, stream(), matrix(d_), matrix(d_t_), sequences(), none, none);
  }
  /// As forward, without a state.
  auto train_forward() {
    return B::forward(ctx_, p_, stream(), sequences(), typename B::template State<float, float>{}, Keep::everything);
  }

 private:
  template <class P>
  void bind(P& parameters, float* values) {
    zamba::detail::bind_parameters<B>(
        parameters, [&](std::size_t i) { return reinterpret_cast<std::byte*>(values + entries_[i].offset); });
  }
  Matrix<float> matrix(std::vector<float>& values) const { return {values.data(), tokens_, B::d_model}; }
  ResidualIO<float> stream() { return {matrix(x_), matrix(t_), matrix(out_)}; }
  Sequences sequences() const { return {offsets_.data(), starts_.data(), 1, tokens_, tokens_}; }

  Index tokens_;
  Context<cpu> ctx_;
  std::vector<ParameterEntry> entries_;
  std::vector<float> weights_, gradients_, state_values_, x_, t_, out_, d_, d_x_, d_t_;
  std::vector<Index> offsets_, starts_;
  typename B::template Parameters<const float, const float> p_;
  typename B::template Parameters<float, float> d_p_;
  typename B::template State<float, float> state_;
};

/// 2 operations a parameter and position, and those of a causal attention; the weights are read once, the stream is
/// read and written.
template <class B>
void report_block(benchmark::State& state, double passes) {
  const double tokens = static_cast<double>(state.range(0)), d = B::d_model;
  const double weights = static_cast<double>(parameter_count<B>);
  double attention = 0;
  if constexpr (requires { B::kv_width; }) {
    // Scores and weighted values of all heads together: two products of T^2, of which a half is causal.
    attention = 2 * tokens * tokens * static_cast<double>(B::config.n_heads * B::head_dim);
  }
  report(state, passes * (2 * weights * tokens + attention), passes * (weights + 3 * tokens * d) * sizeof(float));
}

/// A forward pass as in prefill, from an empty state. Argument: positions.
template <class B>
void forward_block(benchmark::State& state) {
  BlockRun<B> run(state.range(0), 0);
  for (auto _ : state) {
    ArenaScope scope(run.ctx().arena());
    run.forward(Keep::nothing);
  }
  report_block<B>(state, 1);
}

/// Forward and backward as in training; the backward pass has the products of two forward passes. Argument: positions.
template <class B>
void train_block(benchmark::State& state) {
  BlockRun<B> run(state.range(0), 0);
  for (auto _ : state) {
    ArenaScope scope(run.ctx().arena());
    run.backward(run.train_forward());
  }
  report_block<B>(state, 3);
}

/// One token. Argument: positions before it.
template <class B>
void step_block(benchmark::State& state) {
  BlockRun<B> run(1, state.range(0));
  for (auto _ : state) {
    ArenaScope scope(run.ctx().arena());
    run.forward(Keep::nothing);
  }
  const double read = static_cast<double>(parameter_count<B>) * sizeof(float) +
                      static_cast<double>(state_bytes<B, float>(1, state.range(0) + 1));
  report(state, static_cast<double>(flops_per_token<B>), read);
}

}  // namespace zamba::bench
