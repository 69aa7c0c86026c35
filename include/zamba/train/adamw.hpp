// SPDX-License-Identifier: MIT
// AdamW<Net, T, Device>: the optimiser of a model, with global norm clipping and the decay that each parameter's
// listing asks for. Its arithmetic is ops/adamw_step.hpp.
//
//   zamba::AdamW optimiser(model, {.weight_decay = 0.1, .clip_norm = 1});
//   gradients.zero();
//   model.loss_and_gradients(batch, gradients);
//   optimiser.step(model, gradients, 3e-4);
//
// Moments are float32 (float64 for double). Where weights are stored in less, a master copy in float32 is stepped and
// the weights are its rounding; parameters that are float32 already have no copy. A step allocates nothing after the
// first and waits for no device.
#pragma once

#include <cmath>

#include <zamba/buffer.hpp>
#include <zamba/error.hpp>
#include <zamba/model.hpp>
#include <zamba/ops/adamw_step.hpp>

namespace zamba {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double clip_norm = 1;  // of all gradients together; 0: no clipping
};

template <class Net, class T, class Device>
class AdamW {
 public:
  using F = compute_t<T>;
  using ModelType = Model<Net, T, Device>;
  using GradientsType = Gradients<Net, T, Device>;

  /// Begins from the model's present weights.
  explicit AdamW(const ModelType& model, AdamWOptions options = {});

  /// Replaces the model's weights by those one step on. Which parameters decay is in model.entries().
  void step(Context<Device>& ctx, ModelType& model, const GradientsType& gradients, double learning_rate);
  void step(ModelType& model, const GradientsType& gradients, double learning_rate) {
    step(this_thread_context<Device>(), model, gradients, learning_rate);
  }

  /// The norm of the gradients of the last step, before clipping. Waits for the device.
  double gradient_norm() const {
    double squared = 0;
    Memory<Device>::copy_to_host(&squared, norm_squared(), sizeof squared);
    return std::sqrt(squared);
  }

  const AdamWOptions& options() const { return options_; }

  /// What a checkpoint holds: the moments and the master copy, in the device's memory, at the offsets of
  /// ParameterEntry, and the number of steps taken. No master copy is needed, and its view is empty, where T is F.
  Vector<F> first_moments() const { return part(0); }
  Vector<F> second_moments() const { return part(1); }
  Vector<F> master() const { return has_master ? part(2) : Vector<F>{}; }
  Index steps() const { return steps_; }
  void set_steps(Index steps) {
    require(steps >= 0, "AdamW: the number of steps must be 0 or more, got ", steps);
    steps_ = steps;
  }

 private:
  static constexpr bool has_master = !std::is_same_v<T, F>;

  Vector<F> part(Index i) const { return {reinterpret_cast<F*>(buffer_.data()) + i * stride_, count_}; }
  double* norm_squared() const { return reinterpret_cast<double*>(norm_.data()); }

  AdamWOptions options_;
  Index count_ = 0, stride_ = 0, steps_ = 0;
  Buffer<Device> buffer_, norm_;
};

/// The norm of all gradients together.
template <class Net, class T>
double global_norm(const Gradients<Net, T, cpu>& gradients) {
  double squared = 0;
  sum_of_squares(this_thread_context<cpu>(), gradients.values(), &squared);
  return std::sqrt(squared);
}

template <class Net, class T, class Device>
AdamW<Net, T, Device>::AdamW(const ModelType& model, AdamWOptions options) : options_(options), norm_(sizeof(double)) {
  require(options.beta1 >= 0 && options.beta1 < 1 && options.beta2 >= 0 && options.beta2 < 1,
          "AdamW: beta1 and beta2 must be in [0, 1), got ", options.beta1, " and ", options.beta2);
  require(options.eps > 0 && options.weight_decay >= 0 && options.clip_norm >= 0,
          "AdamW: eps must be positive, weight_decay and clip_norm 0 or more, got ", options.eps, ", ",
          options.weight_decay, " and ", options.clip_norm);
  const ParameterEntry& last = model.entries().back();
  count_ = last.offset + last.size;
  stride_ = static_cast<Index>(align_up(static_cast<std::size_t>(count_) * sizeof(F)) / sizeof(F));
  buffer_ = Buffer<Device>(static_cast<std::size_t>(stride_) * sizeof(F) * (has_master ? 3 : 2));
  Memory<Device>::zero(buffer_.data(), buffer_.size());
  Memory<Device>::zero(norm_.data(), norm_.size());
  if constexpr (has_master) {
    std::vector<F> values;
    for (const ParameterEntry& entry : model.entries()) {
      const std::vector<double> weights = model.read(entry);
      values.assign(weights.begin(), weights.end());
      Memory<Device>::copy_from_host(master().data + entry.offset, values.data(), values.size() * sizeof(F));
    }
  }
}

template <class Net, class T, class Device>
void AdamW<Net, T, Device>::step(Context<Device>& ctx, ModelType& model, const GradientsType& gradients,
                                 double learning_rate) {
  require(gradients.values().size() == count_, "AdamW: made for a model of another size");
  sum_of_squares(ctx, gradients.values(), norm_squared());
  ++steps_;
  for (const ParameterEntry& entry : model.entries()) {
    const double decay = entry.decay == Decay::yes ? options_.weight_decay : 0;
    const AdamWScalars scalars{learning_rate, options_.beta1,     options_.beta2, options_.eps,
                               decay,         options_.clip_norm, steps_};
    const auto of = [&](Vector<F> values) { return values.slice(entry.offset, entry.size); };
    const auto run = [&]<class W>(W* weight, Vector<F> master) {
      const AdamWTensors<W, F> tensors{
          {weight, entry.size}, master, of(gradients.values()), of(first_moments()), of(second_moments())};
      adamw_step(ctx, tensors, scalars, norm_squared());
    };
    if (entry.precise || !has_master)
      run(reinterpret_cast<F*>(model.data(entry)), {});
    else
      run(reinterpret_cast<T*>(model.data(entry)), of(master()));
  }
}

}  // namespace zamba
