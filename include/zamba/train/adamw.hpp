// SPDX-License-Identifier: MIT
// AdamW<Net, T, Device>: the optimiser of a model, with global norm clipping and the decay that each parameter's
// listing asks for. Its arithmetic is ops/adamw_step.hpp.
//
//   zamba::AdamW optimiser(model, {.weight_decay = 0.1, .clip_norm = 1});
//   gradients.zero();
//   model.loss_and_gradients(batch, gradients);
//   optimiser.step(model, gradients, 3e-4);
//
// Moments are float32 (float64 for double). Weights in bf16 stand for float32 masters, which are stepped: a weight is
// the bf16 nearest to its master, and the master's lower 16 bits are kept here (SplitFloat). So a weight that is
// written between steps moves its master along, to within that rounding. A step allocates nothing after the first. It
// reads the norm of the gradients before anything is changed: gradients that are not finite are an Error that names
// them, and no step. Groups of parameters may have a rate of their own or be frozen (train/parameter_groups.hpp). What
// is frozen neither steps nor decays, its moments stay, and the norm that clips is that of the others' gradients: its
// own are computed as ever, and may be anything. A gradient of zero freezes nothing: such weights decay where they are
// listed so, and move on by their momentum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/error.hpp>
#include <zamba/kernel/finite.hpp>
#include <zamba/model.hpp>
#include <zamba/number.hpp>
#include <zamba/ops/adamw_step.hpp>
#include <zamba/ops/add.hpp>
#include <zamba/train/parameter_groups.hpp>

namespace zamba {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double clip_norm = 1;  // of all gradients together, but those of frozen parameters; 0: no clipping
  std::vector<ParameterGroup> groups{};

  /// Throws where a number makes no sense in the arithmetic of F, naming it.
  template <class F>
  void check() const;
};

/// What decides whether a step is taken, in memory of the device.
struct StepNumbers {
  LossSum loss;             // of the gradients: where its sum is not finite, there is no step
  double norm_squared = 0;  // of the gradients that count, written by queue_step()
  double part = 0;          // of it: scratch
};

template <class Net, class T, class Device>
class AdamW {
  static_assert(Number<weight_t<T>>,
                "zamba::AdamW: weights that are no plain numbers are not trained: train a model of float or bf16 and "
                "convert it with to<Types<W, A, C>>()");

 public:
  using F = compute_t<T>;
  using ModelType = Model<Net, T, Device>;
  using GradientsType = Gradients<Net, T, Device>;

  /// Begins from the model's present weights. Throws for options that make no sense, as a group without parameters.
  explicit AdamW(const ModelType& model, AdamWOptions options = {});

  /// Replaces the model's weights by those one step on. Which parameters decay is in model.entries(). Throws, and
  /// changes neither weights nor moments, for a rate that check_rate() refuses and for gradients that are not finite.
  void step(Context<Device>& ctx, ModelType& model, const GradientsType& gradients, double learning_rate);
  void step(ModelType& model, const GradientsType& gradients, double learning_rate) {
    step(this_thread_context<Device>(), model, gradients, learning_rate);
  }

  /// The halves of step(), for who has more to queue before the host waits. The first queues all of it, for a device
  /// that decides by `numbers` whether to change anything; the second, given these as they were then, throws where it
  /// did not, or counts the step.
  void queue_step(Context<Device>& ctx, ModelType& model, const GradientsType& gradients, double learning_rate,
                  StepNumbers* numbers);
  void settle_step(const ModelType& model, const GradientsType& gradients, const StepNumbers& numbers);
  bool accepts(const StepNumbers& numbers) const {
    return can_step<F>(std::sqrt(numbers.norm_squared), options_.clip_norm) && is_finite(numbers.loss.sum);
  }

  /// Throws where the rate is not finite, negative, or, multiplied by that of a group, so large that a step could not
  /// be finite.
  void check_rate(double learning_rate) const;

  /// The norm of the last gradients that were given to step(), but for those of frozen parameters, before clipping.
  double gradient_norm() const { return gradient_norm_; }

  const AdamWOptions& options() const { return options_; }
  /// What the learning rate is multiplied by for each of model.entries(); 0: it is frozen.
  const std::vector<double>& rates() const { return rates_; }

  /// Its state: the moments and, of bf16 weights, the lower halves of masters, in the device's memory at the offsets of
  /// ParameterEntry, and the number of steps taken. Where weights are stored as F there are no halves, and the view is
  /// empty.
  Vector<F> first_moments() const { return part(0); }
  Vector<F> second_moments() const { return part(1); }
  Vector<std::uint16_t> lower_halves() const {
    if (!splits_weights) return {};
    return {reinterpret_cast<std::uint16_t*>(part(2).data), count_};
  }
  Index steps() const { return steps_; }
  void set_steps(Index steps) {
    require(steps >= 0 && steps < std::numeric_limits<Index>::max(),
            "AdamW: the number of steps must be 0 or more, and leave room for one more, got ", steps);
    steps_ = steps;
  }

  /// Whether weights that are not `precise` are the upper halves of masters.
  static constexpr bool splits_weights = !std::is_same_v<weight_t<T>, F>;

  /// Masters, of a parameter's elements from `first` on. Where they are written their weights are, too. Neither takes
  /// memory.
  void read_masters(const ModelType& model, const ParameterEntry& entry, Index first, std::span<float> values) const;
  void write_masters(ModelType& model, const ParameterEntry& entry, Index first, std::span<const float> values);

 private:
  /// Elements of parameters that follow each other, and none of them frozen.
  struct Run {
    Index first, count;
  };

  /// The halves of some masters, on the host.
  struct Halves {
    static constexpr std::size_t size() { return 1 << 15; }
    bf16 weights[size()];
    std::uint16_t low[size()];
  };

  void measure(Context<Device>& ctx, const GradientsType& gradients, StepNumbers* numbers) const;
  [[noreturn]] void fail_for_norm(const ModelType& model, const GradientsType& gradients, double norm) const;

  Vector<F> part(Index i) const { return {reinterpret_cast<F*>(buffer_.data()) + i * stride_, count_}; }

  AdamWOptions options_;
  std::vector<double> rates_;
  double largest_rate_ = 0;  // of these
  double gradient_norm_ = 0;
  std::vector<Run> runs_;
  Index count_ = 0, stride_ = 0, steps_ = 0;
  Buffer<Device> buffer_;  // the parts, then StepNumbers
};

/// The norm of all gradients together. Waits for the device.
template <class Net, class T, class Device>
double global_norm(Context<Device>& ctx, const Gradients<Net, T, Device>& gradients) {
  ArenaScope scope(ctx.arena());
  const Vector<double> on_device = ctx.arena().template tensor<double>(1);
  sum_of_squares(ctx, gradients.values(), on_device.data);
  double squared = 0;
  Memory<Device>::copy_to_host(&squared, on_device.data, sizeof squared);
  return std::sqrt(squared);
}
template <class Net, class T, class Device>
double global_norm(const Gradients<Net, T, Device>& gradients) {
  return global_norm(this_thread_context<Device>(), gradients);
}

template <class F>
void AdamWOptions::check() const {
  constexpr double least = static_cast<double>(std::numeric_limits<F>::min()),
                   largest = static_cast<double>(std::numeric_limits<F>::max());
  const auto below_1 = [](double beta) { return is_finite(beta) && beta >= 0 && beta < 1 && static_cast<F>(beta) < 1; };
  const char* const type = sizeof(F) == sizeof(float) ? "float" : "double";
  require(below_1(beta1) && below_1(beta2), "AdamW: beta1 and beta2 must be in [0, 1), got ", beta1, " and ", beta2,
          " in the arithmetic of ", type);
  require(is_finite(eps) && eps >= least && eps <= largest, "AdamW: eps must be positive and a number of ", type, ", ",
          least, " to ", largest, ", got ", eps);
  require(is_finite(weight_decay) && weight_decay >= 0, "AdamW: weight_decay must be finite and 0 or more, got ",
          weight_decay);
  // An infinite norm is never reached; one that F takes for 0 would take the gradients with it.
  require(!is_nan(clip_norm) && (clip_norm == 0 || clip_norm >= least),
          "AdamW: clip_norm must be 0 (no clipping), or from ", least, " on, got ", clip_norm);
}

template <class Net, class T, class Device>
AdamW<Net, T, Device>::AdamW(const ModelType& model, AdamWOptions options) : options_(std::move(options)) {
  options_.check<F>();
  const std::vector<ParameterEntry>& entries = model.entries();
  rates_ = detail::group_rates(entries, options_.groups);
  largest_rate_ = *std::max_element(rates_.begin(), rates_.end());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (rates_[i] == 0) continue;
    if (i == 0 || rates_[i - 1] == 0) runs_.push_back({entries[i].offset, 0});
    runs_.back().count = entries[i].offset + entries[i].size - runs_.back().first;
  }
  count_ = entries.back().offset + entries.back().size;
  stride_ = static_cast<Index>(align_up(static_cast<std::size_t>(count_) * sizeof(F)) / sizeof(F));
  buffer_ = Buffer<Device>(adamw_state_bytes<weight_t<T>, F>(count_));
  Memory<Device>::zero(buffer_.data(), buffer_.size());  // masters begin as the weights: nothing is below them
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::read_masters(const ModelType& model, const ParameterEntry& entry, Index first,
                                         std::span<float> values) const {
  Halves halves;
  for (std::size_t i = 0; i < values.size(); i += halves.size()) {
    const auto to = values.subspan(i, std::min(halves.size(), values.size() - i));
    const Index at = first + static_cast<Index>(i);
    Memory<Device>::copy_to_host(halves.weights, reinterpret_cast<const bf16*>(model.data(entry)) + at, 2 * to.size());
    Memory<Device>::copy_to_host(halves.low, lower_halves().data + entry.offset + at, 2 * to.size());
    for (std::size_t k = 0; k < to.size(); ++k)
      to[k] = static_cast<float>(SplitFloat(halves.weights[k], halves.low[k]));
  }
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::write_masters(ModelType& model, const ParameterEntry& entry, Index first,
                                          std::span<const float> values) {
  Halves halves;
  for (std::size_t i = 0; i < values.size(); i += halves.size()) {
    const auto from = values.subspan(i, std::min(halves.size(), values.size() - i));
    const Index at = first + static_cast<Index>(i);
    for (std::size_t k = 0; k < from.size(); ++k) {
      const SplitFloat split(from[k]);
      halves.weights[k] = split.nearest;
      halves.low[k] = split.low;
    }
    Memory<Device>::copy_from_host(reinterpret_cast<bf16*>(model.data(entry)) + at, halves.weights, 2 * from.size());
    Memory<Device>::copy_from_host(lower_halves().data + entry.offset + at, halves.low, 2 * from.size());
  }
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::check_rate(double learning_rate) const {
  require(is_finite(learning_rate) && learning_rate >= 0, "AdamW: the learning rate must be finite and 0 or more, got ",
          learning_rate);
  const double largest = learning_rate * largest_rate_;
  const char* const whose = largest_rate_ == 1 ? "" : ", multiplied by the rate of a parameter group,";
  require(largest / (1 - options_.beta1) <= static_cast<double>(std::numeric_limits<F>::max()),
          "AdamW: a learning rate of ", largest, whose,
          " is too large: over 1 - beta1 it is infinite in the arithmetic of the weights");
  require(largest * options_.weight_decay <= 1, "AdamW: a learning rate of ", largest, whose, " and a weight_decay of ",
          options_.weight_decay, " have a product above 1: a step would not shrink the weights but turn their signs");
}

/// The squared norm of the gradients that count: of every run, then their sum, in order.
template <class Net, class T, class Device>
void AdamW<Net, T, Device>::measure(Context<Device>& ctx, const GradientsType& gradients, StepNumbers* numbers) const {
  const Matrix<double> sum{&numbers->norm_squared, 1, 1}, part{&numbers->part, 1, 1};
  for (const Run& run : runs_) {
    const bool first = &run == runs_.data();
    sum_of_squares(ctx, gradients.values().slice(run.first, run.count), first ? sum.data : part.data);
    if (!first) add(ctx, part, sum);
  }
}

/// Names the first gradient that counts and is not finite.
template <class Net, class T, class Device>
void AdamW<Net, T, Device>::fail_for_norm(const ModelType& model, const GradientsType& gradients, double norm) const {
  std::vector<F> values;
  for (std::size_t i = 0; i < rates_.size(); ++i) {
    if (rates_[i] == 0) continue;
    const ParameterEntry& entry = model.entries()[i];
    values.resize(static_cast<std::size_t>(entry.size));
    Memory<Device>::copy_to_host(values.data(), gradients.values().data + entry.offset, values.size() * sizeof(F));
    const Index at = kernel::first_non_finite<F>(values.data(), entry.size);
    if (at < entry.size)
      fail("AdamW: the norm of the gradients is ", norm, ": element ", at, " of that of '", entry.name, "' is ",
           values[static_cast<std::size_t>(at)], "; weights and moments are as they were");
  }
  fail("AdamW: the norm of the gradients is ", norm, ", too large for second moments",
       options_.clip_norm > 0 ? ", clipped too" : " without clip_norm", "; weights and moments are as they were");
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::step(Context<Device>& ctx, ModelType& model, const GradientsType& gradients,
                                 double learning_rate) {
  auto* const numbers = reinterpret_cast<StepNumbers*>(buffer_.data() + buffer_.size() - alignment);
  queue_step(ctx, model, gradients, learning_rate, numbers);
  ctx.post(Vector<const StepNumbers>(numbers, 1));
  settle_step(model, gradients, *ctx.template posted<StepNumbers>());
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::queue_step(Context<Device>& ctx, ModelType& model, const GradientsType& gradients,
                                       double learning_rate, StepNumbers* numbers) {
  require(gradients.values().size() == count_, "AdamW: made for a model of another size");
  check_rate(learning_rate);
  measure(ctx, gradients, numbers);
  for (std::size_t i = 0; i < rates_.size(); ++i) {
    if (rates_[i] == 0) continue;
    const ParameterEntry& entry = model.entries()[i];
    const double rate = learning_rate * rates_[i], decay = entry.decay == Decay::yes ? options_.weight_decay : 0;
    const AdamWScalars scalars{rate,  options_.beta1,     options_.beta2, options_.eps,
                               decay, options_.clip_norm, steps_ + 1,     &numbers->loss.sum};
    const auto of = [&](auto values) { return values.slice(entry.offset, entry.size); };
    const auto run = [&]<class W>(W* weight, Vector<std::uint16_t> low) {
      const AdamWTensors<W, F> tensors{
          {weight, entry.size}, low, of(gradients.values()), of(first_moments()), of(second_moments())};
      adamw_step(ctx, tensors, scalars, &numbers->norm_squared);
    };
    if (entry.precise || !splits_weights)
      run(reinterpret_cast<F*>(model.data(entry)), {});
    else
      run(reinterpret_cast<weight_t<T>*>(model.data(entry)), of(lower_halves()));
  }
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::settle_step(const ModelType& model, const GradientsType& gradients,
                                        const StepNumbers& numbers) {
  gradient_norm_ = std::sqrt(numbers.norm_squared);
  if (!can_step<F>(gradient_norm_, options_.clip_norm)) fail_for_norm(model, gradients, gradient_norm_);
  require(is_finite(numbers.loss.sum), "AdamW: the loss is ", numbers.loss.sum,
          "; weights and moments are as they were");
  ++steps_;
}

}  // namespace zamba
