// SPDX-License-Identifier: MIT
// Trainer: takes a model through the phases of its training.
//
//   zamba::Trainer trainer(model, phases, {.rows = 8, .length = 512, .folder = "run", .held_out = held_out});
//   trainer.run();
//
// A step draws `accumulation` batches of `rows` windows of `length` tokens, adds up their gradients, and steps AdamW at
// the phase's learning rate. Its loss is the mean over all targets of the step, wherever they are: every gradient is
// scaled by 1 / (targets of the step).
//
// The folder gets
//   checkpoint.safetensors   the newest state of the run (train/checkpoint.hpp)
//   phase-1.safetensors ...  the same, as it was at the end of each phase
//   log.jsonl                one JSON object a step, and one a held-out measurement
//   loss.svg                 the loss so far, drawn at the end of each phase
//
// Exact resume: a Trainer made on a folder with a checkpoint continues there. Batches are functions of (seed, step,
// micro-batch) and nothing else is kept in memory between steps, so a run that was killed at any moment, and made
// again with as many threads, ends with the bytes of one that was not; so does its log, but for the key "time".
// After the first step nothing is allocated, except by logs, measurements and checkpoints.
//
// A device that queues work is never waited for within a step (train/trainer/step_queue.hpp), but for the last one
// before a measurement or a checkpoint. Whoever reads the weights after a step, on_step too, finds what that step left.
//
// stop() ends a run after the step that is under way, as where a system asks the program to end:
//
//   static std::atomic<zamba::Trainer<Net>*> running;
//   running = &trainer;
//   std::signal(SIGTERM, [](int) { running.load()->stop(); });
//   trainer.run();  // returns with a checkpoint written; a Trainer on the same folder goes on from there
//
// All that can be told before the first step is told then: options that would be ignored, ids outside the vocabulary.
// A step whose loss or gradients are not finite is not taken: an Error names it, the model is as it was, and no
// checkpoint ever holds such a number. Trouble with the log, the picture or a measurement ends no run: it is told on
// `progress` at once, and thrown as an Error when the checkpoint of the phase is on the disk.
#pragma once

#include <atomic>
#include <exception>
#include <filesystem>
#include <numbers>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <zamba/eval/bits_per_byte.hpp>
#include <zamba/number.hpp>
#include <zamba/train/checkpoint.hpp>
#include <zamba/train/phase.hpp>
#include <zamba/train/progress.hpp>
#include <zamba/train/run_folder.hpp>
#include <zamba/train/trainer/arithmetic.hpp>
#include <zamba/train/trainer/phase_plan.hpp>
#include <zamba/train/trainer/step_queue.hpp>
#include <zamba/train/trainer/trouble.hpp>
#include <zamba/train/trainer_options.hpp>

namespace zamba {

template <class Net, class T = float, class Device = cpu>
class Trainer {
 public:
  using ModelType = Model<Net, T, Device>;

  /// Begins, or continues where the folder's checkpoint is. Model, context and token files must outlive the trainer.
  Trainer(Context<Device>& ctx, ModelType& model, std::vector<Phase> phases, TrainerOptions options);
  Trainer(ModelType& model, std::vector<Phase> phases, TrainerOptions options)
      : Trainer(this_thread_context<Device>(), model, std::move(phases), std::move(options)) {}

  /// To the end of the last phase, or to a stop().
  void run();
  /// To the end of the phase that comes next, or is under way; or to a stop().
  void run_phase();
  /// One step, with the log, measurement and checkpoint that are due after it. Throws where its loss or gradients are
  /// not finite: then neither model, moments nor step() have changed.
  void take_step();
  bool finished() const { return step_ == plan_.steps(); }

  /// Ends a run after the step that is under way, with a checkpoint where there is a folder; where none is under way,
  /// the next one before its first step. For on_step, other threads and signal handlers: it does nothing but set a
  /// lock-free flag.
  void stop() noexcept { stop_.store(true, std::memory_order_relaxed); }
  /// Whether the last run(), run_phase() or take_step() met a stop(). The next one goes on.
  bool stopped() const { return stopped_; }

  Index step() const { return step_; }
  Index steps() const { return plan_.steps(); }
  Index tokens_per_step() const { return options_.rows * options_.length * options_.accumulation; }
  Index tokens() const { return step_ * tokens_per_step(); }
  /// The mean loss of the last step, in nats per target.
  double loss() const { return loss_; }
  /// Of the model as it is.
  double held_out_bits_per_byte();
  const AdamW<Net, T, Device>& optimiser() const { return queue_.optimiser(); }
  /// What went wrong with log, picture or measurements and was not thrown yet; empty: nothing.
  const std::string& trouble() const { return trouble_.text(); }

 private:
  static TrainerOptions checked(TrainerOptions options) {
    options.check();
    return options;
  }
  void check_rates() const;
  detail::FittingCheckpoint<Net, T, Device> open_checkpoint(const Safetensors& file);
  void advance(Index end);
  void report(double rate, double seconds);
  void end_run();
  bool to_stop() const { return stop_.load(std::memory_order_relaxed); }
  bool at_end_of_phase() const { return plan_.ends_at(step_); }
  /// Does what a run is not to be lost for.
  template <class F>
  void aside(F&& f) {
    trouble_.aside(step_, progress_ ? &*progress_ : nullptr, std::forward<F>(f));
  }
  void tell_trouble();
  void log_measurement();
  void save();
  void draw_loss() const;
  void show(const StepReport& report);
  void call_back(const StepReport& report) const;
  Metadata arithmetic() const;
  /// Whether something that happens every so many steps, and at the end of each phase, is due after so many.
  bool due(Index every, Index step) const { return (every > 0 && step % every == 0) || plan_.ends_at(step); }
  bool due(Index every) const { return due(every, step_); }

  Context<Device>& ctx_;
  ModelType& model_;
  TrainerOptions options_;
  detail::PhasePlan plan_;
  detail::StepQueue<Net, T, Device> queue_;
  PackedBatch held_out_batch_;
  std::optional<detail::RunFolder> folder_;
  std::optional<StepLog> log_;
  std::optional<ProgressLine> progress_;
  Index step_ = 0, measured_at_ = -1;
  Index saved_at_ = 0;  // the beginning needs no checkpoint
  std::atomic<bool> stop_{false};
  static_assert(std::atomic<bool>::is_always_lock_free, "zamba::Trainer: stop() may be called by a signal handler");
  bool stopped_ = false;
  double loss_ = 0, measured_ = 0, seconds_per_step_ = 0;
  detail::Trouble trouble_;
};

template <class Net, class T, class Device>
Trainer<Net, T, Device>::Trainer(Context<Device>& ctx, ModelType& model, std::vector<Phase> phases,
                                 TrainerOptions options)
    : ctx_(ctx),
      model_(model),
      options_(checked(std::move(options))),
      plan_(std::move(phases), tokens_per_step(), options_.length),
      queue_(ctx, model, options_, plan_),
      trouble_(options_.progress) {
  check_rates();
  plan_.check_texts(options_.held_out, Net::vocabulary);
  if (options_.progress) progress_.emplace(*options_.progress, options_.progress_fd);
  if (!options_.folder.empty()) {
    const std::filesystem::path checkpoint = options_.folder / "checkpoint.safetensors";
    folder_.emplace(options_.folder);
    log_.emplace(options_.folder / "log.jsonl");
    if (is_there(checkpoint)) {
      const Safetensors file = Safetensors::open(checkpoint);
      const auto fitting = open_checkpoint(file);
      log_->truncate_after(step_);
      fitting.load();                                      // last: what throws before has not touched the model
      if (at_end_of_phase()) aside([&] { draw_loss(); });  // the run may have been killed before it did
      return;
    }
  }
  if (!options_.start_from.empty()) load_weights(options_.start_from, model_, &queue_.optimiser());
  if (log_) log_->truncate_after(-1);
  aside([&] { log_measurement(); });
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::check_rates() const {
  for (const Phase& phase : plan_.phases()) {
    try {
      queue_.optimiser().check_rate(phase.rate.peak());
    } catch (const Error& error) {
      fail("Trainer: phase '", phase.name, "': ", detail::without_prefix(error.what()));
    }
  }
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::run() {
  queue_.forget();
  while (!finished() && !to_stop()) advance(steps());
  end_run();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::run_phase() {
  queue_.forget();
  if (!finished())
    for (const Index end = plan_.end(plan_.phase_at(step_)); step_ < end && !to_stop();) advance(end);
  end_run();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::take_step() {
  queue_.forget();
  advance(step_ + 1);
  if (at_end_of_phase() || to_stop()) end_run();
}

/// What a stop() wants, and what aside() caught.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::end_run() {
  stopped_ = stop_.exchange(false, std::memory_order_relaxed);
  if (stopped_ && saved_at_ != step_) save();
  tell_trouble();
}

/// Takes a step, one of those before `end`.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::advance(Index end) {
  require(!finished(), "Trainer: all ", step_, " steps were taken");
  stopped_ = false;
  const Index next = step_ + 1;
  const bool ahead =
      next < end && !due(options_.evaluate_every_steps, next) && !due(options_.checkpoint_every_steps, next);
  const double rate = plan_.rate_at(step_);
  typename detail::StepQueue<Net, T, Device>::Taken taken;
  try {
    taken = queue_.take(step_, ahead);
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& error) {
    fail("Trainer: step ", next, ", in phase '", plan_.phases()[plan_.phase_at(step_)].name,
         "', was not taken: ", detail::without_prefix(error.what()), "; the model is as it was after step ", step_);
  }
  loss_ = taken.loss;
  step_ = next;
  report(rate, taken.seconds);
}

/// What is due after a step.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::report(double rate, double seconds) {
  const Phase& phase = plan_.phases()[plan_.phase_at(step_ - 1)];
  const StepReport report{step_, phase.name, loss_, rate, optimiser().gradient_norm(), tokens(), seconds};
  aside([&] { show(report); });
  if (due(options_.evaluate_every_steps)) aside([&] { log_measurement(); });
  if (due(options_.checkpoint_every_steps)) save();
  if (options_.on_step) call_back(report);
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::call_back(const StepReport& report) const {
  try {
    options_.on_step(report);
  } catch (const std::exception& error) {
    fail("Trainer: on_step threw, after step ", step_, " of ", steps(), ": ", detail::without_prefix(error.what()),
         "; the step is whole, and the run can go on");
  }
}

/// Throws what aside() caught.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::tell_trouble() {
  if (trouble_.text().empty()) return;
  fail("Trainer: ", step_, " of ", steps(), " steps are taken, ", folder_ ? "the checkpoint is written, " : "",
       "and the run can go on; but there was trouble ", trouble_.take());
}

/// The progress line, and a line of the log.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::show(const StepReport& report) {
  seconds_per_step_ = seconds_per_step_ > 0 ? 0.9 * seconds_per_step_ + 0.1 * report.seconds : report.seconds;
  const auto tokens = static_cast<double>(tokens_per_step()), steps_left = static_cast<double>(steps() - step_);
  if (progress_) progress_->update({step_, steps(), loss_, tokens / seconds_per_step_, steps_left * seconds_per_step_});
  if (!log_ || !due(options_.log_every_steps)) return;
  log_->append({{"step", report.step},
                {"phase", report.phase},
                {"tokens", report.tokens},
                {"loss", report.loss},
                {"learning_rate", report.rate},
                {"gradient_norm", report.gradient_norm},
                {"time", {{"seconds", report.seconds}, {"tokens_per_second", tokens / report.seconds}}}});
}

template <class Net, class T, class Device>
double Trainer<Net, T, Device>::held_out_bits_per_byte() {
  require(options_.held_out.file, "Trainer: there is no held-out text to measure: TrainerOptions has no held_out");
  if (measured_at_ != step_) {
    const LossSum loss =
        held_out_loss(ctx_, model_, options_.held_out, options_.length, options_.rows, held_out_batch_);
    measured_ = bits_per_byte(loss, options_.bytes_per_token);
    measured_at_ = step_;
  }
  return measured_;
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::log_measurement() {
  if (!options_.held_out.file || !log_) return;
  log_->append({{"step", step_}, {"tokens", tokens()}, {"held_out_bits_per_byte", held_out_bits_per_byte()}});
}

/// The log is complete up to this step, on the disk, before the checkpoint says so. The picture comes after it.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::save() {
  if (!folder_) return;
  aside([&] { log_->sync(); });
  Metadata metadata = arithmetic();
  metadata["step"] = std::to_string(step_);
  metadata["tokens"] = std::to_string(tokens());
  if (at_end_of_phase()) {
    const std::string name = "phase-" + std::to_string(plan_.begun_at(step_)) + ".safetensors";
    save_checkpoint(options_.folder / name, model_, queue_.optimiser(), metadata);
  }
  save_checkpoint(options_.folder / "checkpoint.safetensors", model_, queue_.optimiser(), metadata);
  saved_at_ = step_;
  if (at_end_of_phase()) aside([&] { draw_loss(); });
}

/// All that decides the numbers of the run so far.
template <class Net, class T, class Device>
Metadata Trainer<Net, T, Device>::arithmetic() const {
  Metadata text = detail::arithmetic_of(options_, model_.entries(), queue_.optimiser().rates());
  text["device"] = ctx_.kind();
  text["storage"] = name_of(dtype_of<weight_t<T>>());
  plan_.describe(step_, text);
  return text;
}

/// Throws unless the run can go on from it exactly; sets step_, and nothing else.
template <class Net, class T, class Device>
detail::FittingCheckpoint<Net, T, Device> Trainer<Net, T, Device>::open_checkpoint(const Safetensors& file) {
  detail::check_architecture<Net>(file);
  step_ = saved_at_ = metadata_number(file, "step");
  detail::check_arithmetic(file, arithmetic());
  require(step_ > 0 && step_ <= steps(), "Trainer: '", file.origin(), "' was at step ", step_,
          ", the phases given now end at step ", steps());
  return {file, model_, queue_.optimiser()};
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::draw_loss() const {
  detail::draw_losses(log_->path(), options_.folder / "loss.svg", 1 / std::numbers::ln2 / options_.bytes_per_token,
                      plan_.bands(step_));
}

}  // namespace zamba
