// SPDX-License-Identifier: MIT
// StepQueue: the steps of a run on their way through the device: batches, gradients, optimiser.
//
// A device that queues work is never waited for within a step. Losses, the norm of the gradients, and whether the step
// is taken stay on the device; the host reads them when it has drawn the batches of the next step and queued its
// gradients. Weights are stepped only when the step before was found to be good, so at no time is there more to take
// back than gradients, which nobody misses.
//
//   host    gradients 0, update 0 | gradients 1, read 0, update 1 | gradients 2, read 1, update 2 | ...
//   device                gradients 0, update 0, gradients 1,         update 1, gradients 2, ...
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <exception>
#include <new>
#include <vector>

#include <zamba/data/mixture.hpp>
#include <zamba/error.hpp>
#include <zamba/model.hpp>
#include <zamba/number.hpp>
#include <zamba/train/adamw.hpp>
#include <zamba/train/trainer/phase_plan.hpp>
#include <zamba/train/trainer_options.hpp>

namespace zamba::detail {

template <class Net, class T, class Device>
class StepQueue {
 public:
  using ModelType = Model<Net, T, Device>;
  using Optimiser = AdamW<Net, T, Device>;

  /// All that is given must outlive it.
  StepQueue(Context<Device>& ctx, ModelType& model, const TrainerOptions& options, const PhasePlan& plan);

  struct Taken {
    double loss = 0;  // the mean over all targets
    double seconds = 0;
  };
  /// Takes a step. Throws where its loss or its gradients are not finite, or what computes them throws: then model and
  /// optimiser have not changed. ahead: whether the device may begin the next step before the host knows of this one;
  /// then weights are not to be changed until that is taken, or forget() called.
  Taken take(Index step, bool ahead);
  /// Drops the gradients of a step that was begun ahead.
  void forget() { begun_ = -1; }

  Optimiser& optimiser() { return optimiser_; }
  const Optimiser& optimiser() const { return optimiser_; }

 private:
  using Clock = std::chrono::steady_clock;

  void begin(Index step);
  StepNumbers* numbers() const { return reinterpret_cast<StepNumbers*>(numbers_.data()); }

  Context<Device>& ctx_;
  ModelType& model_;
  const TrainerOptions& options_;
  const PhasePlan& plan_;
  Gradients<Net, T, Device> gradients_;
  Optimiser optimiser_;
  Buffer<Device> numbers_;            // StepNumbers
  std::vector<PackedBatch> batches_;  // of a step
  Index begun_ = -1;                  // the step whose gradients are in gradients_, or on their way there; -1: none
  double scale_ = 0;                  // of its losses: 1 / its targets
  Clock::time_point read_;            // when the last step was
};

template <class Net, class T, class Device>
StepQueue<Net, T, Device>::StepQueue(Context<Device>& ctx, ModelType& model, const TrainerOptions& options,
                                     const PhasePlan& plan)
    : ctx_(ctx),
      model_(model),
      options_(options),
      plan_(plan),
      gradients_(model.entries()),
      optimiser_(model, options.adamw),
      numbers_(sizeof(StepNumbers)) {
  try {
    batches_.resize(static_cast<std::size_t>(options.accumulation));
    for (PackedBatch& batch : batches_) batch.clear(options.rows * options.length);
  } catch (const std::bad_alloc&) {
    throw_error<OutOfMemory>("Trainer: out of memory for batches of ", options.rows, " rows x ", options.length,
                             " tokens x ", options.accumulation, " of a step");
  }
}

/// Queues the gradients of a step, the sum over its micro-batches, and its loss.
template <class Net, class T, class Device>
void StepQueue<Net, T, Device>::begin(Index step) {
  begun_ = -1;
  const Mixture& mixture = plan_.mixture(plan_.phase_at(step));
  Index targets = 0;
  for (std::size_t i = 0; i < batches_.size(); ++i) {
    mixture.draw(options_.seed, step, static_cast<Index>(i), options_.rows, options_.length, batches_[i]);
    targets += std::count_if(batches_[i].targets.begin(), batches_[i].targets.end(), [](Token t) { return t >= 0; });
  }
  scale_ = 1 / static_cast<double>(std::max<Index>(targets, 1));
  ctx_.zero(gradients_.values());
  ctx_.zero(Vector<StepNumbers>(numbers(), 1));
  for (const PackedBatch& batch : batches_)
    model_.loss_and_gradients(ctx_, {batch.tokens, batch.targets, batch.offsets}, gradients_,
                              {.scale = scale_, .keep = options_.keep, .z_loss = options_.z_loss}, &numbers()->loss);
  begun_ = step;
}

template <class Net, class T, class Device>
auto StepQueue<Net, T, Device>::take(Index step, bool ahead) -> Taken {
  const bool was_begun = begun_ == step;
  const auto start = was_begun ? read_ : Clock::now();
  if (!was_begun) begin(step);
  begun_ = -1;
  const double scale = scale_;
  optimiser_.queue_step(ctx_, model_, gradients_, plan_.rate_at(step), numbers());
  ctx_.post(Vector<const StepNumbers>(numbers(), 1));
  if (DeviceTraits<Device>::queues && ahead) {
    try {
      begin(step + 1);
    } catch (const std::exception&) {  // met again, and told, when that step is taken
    }
  }

  const StepNumbers now = *ctx_.template posted<StepNumbers>();
  read_ = Clock::now();
  if (is_nan(now.loss.sum)) fail("the loss is nan");  // of either sign
  require(is_finite(now.loss.sum), "the loss is ", now.loss.sum);
  if (begun_ >= 0 && !optimiser_.accepts(now)) {
    forget();
    return take(step, false);  // the gradients to be named were overwritten: once more, alone
  }
  optimiser_.settle_step(model_, gradients_, now);
  return {now.loss.sum * scale, std::chrono::duration<double>(read_ - start).count()};
}

}  // namespace zamba::detail
