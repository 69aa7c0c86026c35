// SPDX-License-Identifier: MIT
// The loss, the gradients and some steps of training of a reference case.
//
// A network may magnify rounding, the reference's too, beyond those bounds. So where a tensor's gradient, a loss of
// training or a trained parameter exceeds its bound, that very result is computed again with every weight moved by a
// rounding of float32, five times over, and six times the greatest movement is allowed: what a case cannot tell is not
// held against the network. In the case zamba2-two-blocks gradients move by up to 1.7e-4, and losses by 2e-7 at first
// and 6e-2 after seven steps, since AdamW's first steps take little but the signs of a gradient. Logits, states and the
// first loss know no such allowance, and no result of the cases zamba, zamba-gqa and zamba2 needs it.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include <zamba/context.hpp>
#include <zamba/random.hpp>
#include <zamba/testing/check_reference/compare.hpp>
#include <zamba/testing/check_reference/run.hpp>
#include <zamba/train/adamw.hpp>

namespace zamba::testing::detail {

template <class Net, class T, class Device>
class TrainingCheck {
 public:
  using Run = ReferenceRun<Net, T, Device>;

  explicit TrainingCheck(Run& run) : run_(run) {}

  void run() {
    gradients(false);
    gradients(true);
    train();
  }

 private:
  using F = compute_t<T>;
  using ModelType = Model<Net, T, Device>;

  /// The mean loss of the batch, and its gradients added to `gradients`.
  double loss_and_gradients(const ModelType& model, typename ModelType::GradientsType& gradients, bool recompute) {
    std::vector<Token> targets(run_.ids.begin() + 1, run_.ids.end());
    targets.push_back(-1);
    for (Index row = 0; row < run_.batch; ++row) targets[static_cast<std::size_t>((row + 1) * run_.length - 1)] = -1;
    const std::vector<Index> offsets = run_.offsets();
    const TrainingBatch batch{run_.ids, targets, offsets};
    typename ModelType::GradientOptions options;
    options.recompute = recompute;
    return model.loss_and_gradients(this_thread_context<Device>(), batch, gradients, options).mean();
  }

  static Values host_values(const typename ModelType::GradientsType& gradients) {
    std::vector<F> values(static_cast<std::size_t>(gradients.values().size()));
    Memory<Device>::copy_to_host(values.data(), gradients.values().data, values.size() * sizeof(F));
    return {values.begin(), values.end()};
  }

  void gradients(bool recompute) {
    auto gradients = run_.model.new_gradients();
    const double loss = loss_and_gradients(run_.model, gradients, recompute);
    const std::string how = recompute ? ", recomputed" : "";
    if (run_.reference.find("loss")) run_.report.add("loss" + how, run_.error("loss", {loss}), run_.bounds.losses);
    const Values values = host_values(gradients);
    Group group;
    compare_parameters(
        run_.reference, "grad.", run_.model.entries(), run_.layout, gradient_guard,
        [&](const ParameterEntry& entry) {
          return Values(values.begin() + entry.offset, values.begin() + entry.offset + entry.size);
        },
        [&](const ParameterEntry& entry, double error) {
          return allowed(run_.bounds.gradients, error, &Training::gradients, entry.offset, entry.size);
        },
        group);
    group.report(run_.report, "grad" + how);
  }

  /// What steps of AdamW on the batch give; gradients and parameters at the offsets of their entries.
  struct Training {
    Values gradients;  // before the first step
    Values losses, parameters;
  };

  Training train(ModelType model, std::size_t steps) {
    AdamW<Net, T, Device> optimiser(model,
                                    {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip_norm = 1});
    auto gradients = model.new_gradients();
    Training result;
    for (std::size_t step = 0; step < std::max<std::size_t>(steps, 1); ++step) {
      gradients.zero();
      result.losses.push_back(loss_and_gradients(model, gradients, false));
      if (step == 0) result.gradients = host_values(gradients);
      optimiser.step(model, gradients, 1e-3);
    }
    result.parameters.resize(result.gradients.size());
    for (const ParameterEntry& entry : model.entries()) {
      const Values values = model.read(entry);
      std::copy(values.begin(), values.end(), result.parameters.begin() + entry.offset);
    }
    return result;
  }

  void train() {
    const TensorEntry* entry = run_.reference.find("train.losses");
    if (!entry) return;
    const Values wanted = read_values<double>(*entry);
    const Training got = train(run_.model.template to<T>(), wanted.size());
    Group losses, parameters;
    for (std::size_t step = 0; step < wanted.size(); ++step) {
      const double error = relative_error(Values{got.losses[step]}, Values{wanted[step]});
      losses.add("step " + std::to_string(step), error,
                 allowed(run_.bounds.losses, error, &Training::losses, static_cast<Index>(step), 1));
    }
    losses.report(run_.report, "train.losses");
    compare_parameters(
        run_.reference, "train.param.", run_.model.entries(), run_.layout, 0,
        [&](const ParameterEntry& parameter) {
          const auto first = got.parameters.begin() + parameter.offset;
          return Values(first, first + parameter.size);
        },
        [&](const ParameterEntry& parameter, double error) {
          return allowed(run_.bounds.parameters, error, &Training::parameters, parameter.offset, parameter.size);
        },
        parameters);
    parameters.report(run_.report, "train.param");
  }

  /// The bound of an error in elements [first, first + count) of a part of training: `bound`, or, where that does not
  /// do, what a rounding of all weights leaves open.
  double allowed(double bound, double error, Values Training::*part, Index first, Index count) {
    if (error <= bound) return bound;
    const auto elements = [&](const Training& training) {
      return std::span((training.*part).data() + first, static_cast<std::size_t>(count));
    };
    if (rounded_.empty())
      for (std::uint64_t shake = 0; shake <= shakes; ++shake) rounded_.push_back(train(shaken(shake), train_steps()));
    for (std::size_t shake = 1; shake < rounded_.size(); ++shake)
      bound = std::max(bound, 6 * relative_error(elements(rounded_[shake]), elements(rounded_[0])));
    return bound;
  }

  std::size_t train_steps() {
    const TensorEntry* entry = run_.reference.find("train.losses");
    return entry ? static_cast<std::size_t>(entry->count()) : 0;
  }

  /// The model with every weight moved by a rounding of float32, in one way or another; as it is for shake 0.
  ModelType shaken(std::uint64_t shake) const {
    ModelType model = run_.model.template to<T>();
    for (std::size_t i = 0; i < model.entries().size() && shake > 0; ++i) {
      Random random(Seed{shake}, i);
      Values values = model.read(model.entries()[i]);
      for (double& value : values) value *= 1 + 0x1p-24 * random.normal();
      model.write(model.entries()[i], values);
    }
    return model;
  }

  /// A gradient that is far smaller than the others is what is left of larger terms, whose rounding it carries: below
  /// this share of the root mean square of all, the error is measured against that.
  static constexpr double gradient_guard = 1e-4;
  /// Ways of rounding: a tensor of few elements may stay where it is by chance.
  static constexpr std::uint64_t shakes = 5;

  Run& run_;
  std::vector<Training> rounded_;  // of the model and of the shaken ones, where it was asked for
};

}  // namespace zamba::testing::detail
