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
// All that can be told before the first step is told then: options that would be ignored, ids outside the vocabulary.
// A step whose loss or gradients are not finite is not taken: an Error names it, the model is as it was, and no
// checkpoint ever holds such a number. Trouble with the log, the picture or a measurement ends no run: it is told on
// `progress` at once, and thrown as an Error when the checkpoint of the phase is on the disk.
#pragma once

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>
#include <limits>
#include <new>
#include <numbers>
#include <optional>
#include <ostream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <zamba/eval/bits_per_byte.hpp>
#include <zamba/number.hpp>
#include <zamba/train/checkpoint.hpp>
#include <zamba/train/phase.hpp>
#include <zamba/train/progress.hpp>
#include <zamba/train/run_folder.hpp>
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

  /// To the end of the last phase.
  void run();
  /// To the end of the phase that comes next, or is under way.
  void run_phase();
  /// One step, with the log, measurement and checkpoint that are due after it. Throws where its loss or gradients are
  /// not finite: then neither model, moments nor step() have changed.
  void take_step();
  bool finished() const { return step_ == phase_ends_.back(); }

  Index step() const { return step_; }
  Index steps() const { return phase_ends_.back(); }
  Index tokens_per_step() const { return options_.rows * options_.length * options_.accumulation; }
  Index tokens() const { return step_ * tokens_per_step(); }
  /// The mean loss of the last step, in nats per target.
  double loss() const { return loss_; }
  /// Of the model as it is.
  double held_out_bits_per_byte();
  const AdamW<Net, T, Device>& optimiser() const { return optimiser_; }
  /// What went wrong with log, picture or measurements and was not thrown yet; empty: nothing.
  const std::string& trouble() const { return trouble_; }

 private:
  using Clock = std::chrono::steady_clock;

  static TrainerOptions checked(TrainerOptions options) {
    options.check();
    return options;
  }
  void plan_phases();
  void check_texts() const;
  void make_batches();
  detail::FittingCheckpoint<Net, T, Device> open_checkpoint(const Safetensors& file);
  void advance();
  bool at_end_of_phase() const { return std::binary_search(phase_ends_.begin(), phase_ends_.end(), step_); }
  template <class F>
  void aside(F&& f);
  void tell_trouble();
  void log_measurement();
  void save();
  void draw_loss() const;
  void report(const Phase& phase, double rate, double seconds);
  Metadata arithmetic() const;
  std::size_t phase() const {  // that of the next step
    return static_cast<std::size_t>(std::upper_bound(phase_ends_.begin(), phase_ends_.end() - 1, step_) -
                                    phase_ends_.begin());
  }
  /// Whether something that happens every so many steps, and at the end of each phase, is due.
  bool due(Index every) const { return (every > 0 && step_ % every == 0) || at_end_of_phase(); }

  Context<Device>& ctx_;
  ModelType& model_;
  std::vector<Phase> phases_;
  TrainerOptions options_;
  std::vector<Mixture> mixtures_;  // of each phase
  std::vector<Index> phase_ends_;  // in steps
  Gradients<Net, T, Device> gradients_;
  AdamW<Net, T, Device> optimiser_;
  std::vector<PackedBatch> batches_;  // of a step
  PackedBatch held_out_batch_;
  std::optional<detail::RunFolder> folder_;
  std::optional<StepLog> log_;
  std::optional<ProgressLine> progress_;
  Index step_ = 0, measured_at_ = -1;
  double loss_ = 0, measured_ = 0, seconds_per_step_ = 0;
  std::string trouble_;
  Index further_troubles_ = 0;
};

template <class Net, class T, class Device>
Trainer<Net, T, Device>::Trainer(Context<Device>& ctx, ModelType& model, std::vector<Phase> phases,
                                 TrainerOptions options)
    : ctx_(ctx),
      model_(model),
      phases_(std::move(phases)),
      options_(checked(std::move(options))),
      gradients_(model.entries()),
      optimiser_(model, options_.adamw) {
  plan_phases();
  check_texts();
  make_batches();
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
  if (!options_.start_from.empty()) load_weights(options_.start_from, model_, &optimiser_);
  if (log_) log_->truncate_after(-1);
  aside([&] { log_measurement(); });
}

/// Mixtures and ends of all phases.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::plan_phases() {
  require(!phases_.empty(), "Trainer: there is no phase");
  constexpr Index most = std::numeric_limits<Index>::max() / 2;
  Index steps = 0;
  for (const Phase& phase : phases_) {
    require(phase.tokens > 0, "Trainer: phase '", phase.name, "' must have a positive number of tokens, got ",
            phase.tokens);
    phase.rate.check(phase.tokens);
    try {
      optimiser_.check_rate(phase.rate.peak());
    } catch (const Error& error) {
      fail("Trainer: phase '", phase.name, "': ", detail::without_prefix(error.what()));
    }
    if (phase.tokens <= most) steps += phase.tokens / tokens_per_step() + (phase.tokens % tokens_per_step() != 0);
    require(phase.tokens <= most && steps <= most / tokens_per_step(), "Trainer: phase '", phase.name, "' ends beyond ",
            most, " tokens");
    phase_ends_.push_back(steps);
    mixtures_.emplace_back(phase.mixture);
    mixtures_.back().check(options_.length);
    detail::json_text(phase.name);  // names go to the checkpoint's metadata: throws where they could not
    for (const MixtureSource& source : phase.mixture) detail::json_text(source.name);
  }
}

/// Reads every text once, as far as it is used.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::check_texts() const {
  std::vector<TokenRange> ranges;
  const auto add = [&](const TokenRange& range, const std::string& what) {
    range.check();
    const std::string path = range.file->path().string();
    const Token end = range.file->document_end().value_or(0);
    require(end < Net::vocabulary, "Trainer: the document end of '", path, "' is ", end,
            ", outside the model's vocabulary of ", Net::vocabulary);
    require(range.has_target(), "Trainer: ", what, " ('", path, "' from ", range.first, " to ", range.last,
            ") has no target: there is no token that another one follows in its document");
    ranges.push_back(range);
  };
  for (const Phase& phase : phases_)
    for (const MixtureSource& source : phase.mixture)
      add(source.range, "'" + source.name + "' of phase '" + phase.name + "'");
  if (options_.held_out.file) add(options_.held_out, "the held_out text");
  check_vocabulary(std::move(ranges), Net::vocabulary);
}

/// Takes the memory of a step's batches.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::make_batches() {
  try {
    batches_.resize(static_cast<std::size_t>(options_.accumulation));
    for (PackedBatch& batch : batches_) batch.clear(options_.rows * options_.length);
  } catch (const std::bad_alloc&) {
    detail::throw_error<OutOfMemory>("Trainer: out of memory for batches of ", options_.rows, " rows x ",
                                     options_.length, " tokens x ", options_.accumulation, " of a step");
  }
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::run() {
  while (!finished()) advance();
  tell_trouble();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::run_phase() {
  if (!finished())
    for (const Index end = phase_ends_[phase()]; step_ < end;) advance();
  tell_trouble();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::take_step() {
  advance();
  if (at_end_of_phase()) tell_trouble();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::advance() {
  require(!finished(), "Trainer: all ", step_, " steps were taken");
  const auto begin = Clock::now();
  const std::size_t now = phase();
  const Phase& phase = phases_[now];
  const Index phase_step = step_ - (now > 0 ? phase_ends_[now - 1] : 0);
  const double rate = phase.rate.at(phase_step * tokens_per_step(), phase.tokens);

  Index targets = 0;
  for (std::size_t i = 0; i < batches_.size(); ++i) {
    mixtures_[now].draw(options_.seed, step_, static_cast<Index>(i), options_.rows, options_.length, batches_[i]);
    targets += std::count_if(batches_[i].targets.begin(), batches_[i].targets.end(), [](Token t) { return t >= 0; });
  }
  const double scale = 1 / static_cast<double>(std::max<Index>(targets, 1));
  gradients_.zero();
  double sum = 0;
  for (const PackedBatch& batch : batches_)
    sum += model_
               .loss_and_gradients(ctx_, {batch.tokens, batch.targets, batch.offsets}, gradients_,
                                   {.scale = scale, .recompute = options_.recompute})
               .sum;
  const auto refuse = [&](const auto&... cause) {
    fail("Trainer: step ", step_ + 1, ", in phase '", phase.name, "', was not taken: ", cause...,
         "; the model is as it was after step ", step_);
  };
  if (is_nan(sum)) refuse("the loss is nan");  // of either sign
  if (!is_finite(sum)) refuse("the loss is ", sum);
  try {
    optimiser_.step(ctx_, model_, gradients_, rate);
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& error) {
    refuse(detail::without_prefix(error.what()));
  }
  loss_ = sum * scale;
  ++step_;

  aside([&] { report(phase, rate, std::chrono::duration<double>(Clock::now() - begin).count()); });
  if (due(options_.evaluate_every_steps)) aside([&] { log_measurement(); });
  if (due(options_.checkpoint_every_steps)) save();
}

/// Does what a run is not to be lost for.
template <class Net, class T, class Device>
template <class F>
void Trainer<Net, T, Device>::aside(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    if (!trouble_.empty()) {
      ++further_troubles_;
      return;
    }
    trouble_ = "after step " + std::to_string(step_) + ": " + detail::without_prefix(error.what());
    if (!options_.progress) return;
    try {
      if (progress_) progress_->finish();
      *options_.progress << "Trainer: trouble " << trouble_ << "; the training goes on" << std::endl;
    } catch (const std::exception&) {  // a stream that throws may be the trouble itself
    }
  }
}

/// Throws what aside() caught.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::tell_trouble() {
  if (trouble_.empty()) return;
  const Index further = std::exchange(further_troubles_, 0);
  fail("Trainer: ", step_, " of ", steps(), " steps are taken, ", folder_ ? "the checkpoint is written, " : "",
       "and the run can go on; but there was trouble ", std::exchange(trouble_, {}),
       further > 0 ? " (and " + std::to_string(further) + " more since then)" : "");
}

/// The progress line, and a line of the log.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::report(const Phase& phase, double rate, double seconds) {
  seconds_per_step_ = seconds_per_step_ > 0 ? 0.9 * seconds_per_step_ + 0.1 * seconds : seconds;
  const auto tokens = static_cast<double>(tokens_per_step()), steps_left = static_cast<double>(steps() - step_);
  if (progress_) progress_->update({step_, steps(), loss_, tokens / seconds_per_step_, steps_left * seconds_per_step_});
  if (!log_ || !due(options_.log_every_steps)) return;
  log_->append({{"step", step_},
                {"phase", phase.name},
                {"tokens", this->tokens()},
                {"loss", loss_},
                {"learning_rate", rate},
                {"gradient_norm", optimiser_.gradient_norm()},
                {"time", {{"seconds", seconds}, {"tokens_per_second", tokens / seconds}}}});
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
  const auto end = std::find(phase_ends_.begin(), phase_ends_.end(), step_);
  Metadata metadata = arithmetic();
  metadata["step"] = std::to_string(step_);
  metadata["tokens"] = std::to_string(tokens());
  if (end != phase_ends_.end()) {
    const std::string name = "phase-" + std::to_string(end - phase_ends_.begin() + 1) + ".safetensors";
    save_checkpoint(options_.folder / name, model_, optimiser_, metadata);
  }
  save_checkpoint(options_.folder / "checkpoint.safetensors", model_, optimiser_, metadata);
  if (end != phase_ends_.end()) aside([&] { draw_loss(); });
}

/// All that decides the numbers of the phases begun so far. Phases that did not begin yet may still be changed.
template <class Net, class T, class Device>
Metadata Trainer<Net, T, Device>::arithmetic() const {
  const TrainerOptions& o = options_;
  Metadata text{{"rows", std::to_string(o.rows)},
                {"length", std::to_string(o.length)},
                {"accumulation", std::to_string(o.accumulation)},
                {"seed", std::to_string(o.seed.value)},
                {"adamw.beta1", detail::number_text(o.adamw.beta1)},
                {"adamw.beta2", detail::number_text(o.adamw.beta2)},
                {"adamw.eps", detail::number_text(o.adamw.eps)},
                {"adamw.weight_decay", detail::number_text(o.adamw.weight_decay)},
                {"adamw.clip_norm", detail::number_text(o.adamw.clip_norm)},
                {"storage", std::string(name_of(dtype_of<weight_t<T>>()))}};
  for (std::size_t i = 0; i < phases_.size() && (i == 0 || phase_ends_[i - 1] < step_); ++i) {
    const std::string key = "phase " + std::to_string(i + 1) + ".";
    text[key + "name"] = phases_[i].name;
    text[key + "tokens"] = std::to_string(phases_[i].tokens);
    text[key + "rate"] = phases_[i].rate.str();
    text[key + "mixture"] = mixtures_[i].str();
    for (const MixtureSource& source : mixtures_[i].sources()) {
      std::string& prints = text[key + "text of " + source.name];  // names may be equal
      prints += (prints.empty() ? "" : " ") + std::to_string(detail::fingerprint(source.range));
    }
  }
  return text;
}

/// Throws unless the run can go on from it exactly; sets step_, and nothing else.
template <class Net, class T, class Device>
detail::FittingCheckpoint<Net, T, Device> Trainer<Net, T, Device>::open_checkpoint(const Safetensors& file) {
  detail::check_architecture<Net>(file);
  step_ = metadata_number(file, "step");
  std::string differences;
  for (const auto& [key, now] : arithmetic()) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end() || found->second != now)
      differences += "\n  " + key + ": " + (found == file.metadata().end() ? "nothing" : "'" + found->second + "'") +
                     " in the checkpoint, '" + now + "' now";
  }
  require(differences.empty(), "Trainer: '", file.origin(),
          "' was made with other options, and would not be continued exactly:", differences,
          "\nGive the same options, or another folder and this file as start_from: that takes the weights alone, and "
          "begins with new moments, at step 0 of the phases.");
  require(step_ > 0 && step_ <= steps(), "Trainer: '", file.origin(), "' was at step ", step_,
          ", the phases given now end at step ", steps());
  return {file, model_, optimiser_};
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::draw_loss() const {
  std::vector<PlotBand> bands;
  for (std::size_t i = 0; i < phases_.size() && (i == 0 || phase_ends_[i - 1] < step_); ++i) {
    const Index begin = i > 0 ? phase_ends_[i - 1] : 0, end = phase_ends_[i];
    bands.push_back({phases_[i].name, static_cast<double>(begin * tokens_per_step()),
                     static_cast<double>(end * tokens_per_step())});
  }
  detail::draw_losses(log_->path(), options_.folder / "loss.svg", 1 / std::numbers::ln2 / options_.bytes_per_token,
                      std::move(bands));
}

}  // namespace zamba
