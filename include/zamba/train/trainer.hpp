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
#pragma once

#include <sys/file.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <zamba/eval/bits_per_byte.hpp>
#include <zamba/io/line_plot.hpp>
#include <zamba/train/checkpoint.hpp>
#include <zamba/train/phase.hpp>
#include <zamba/train/progress.hpp>

namespace zamba {

struct TrainerOptions {
  Index rows = 8;          // windows in a micro-batch
  Index length = 1024;     // tokens of a window
  Index accumulation = 1;  // micro-batches in a step
  AdamWOptions adamw{};
  Seed seed{};             // of the batches
  bool recompute = false;  // less memory, more time, the same numbers

  std::filesystem::path folder{};      // empty: nothing is written
  std::filesystem::path start_from{};  // weights of another run's checkpoint, where the folder has none
  Index checkpoint_every_steps = 0;    // 0: at the end of each phase only
  Index log_every_steps = 1;

  TokenRange held_out{};           // none: no measurements
  Index evaluate_every_steps = 0;  // 0: at the beginning and at the end of each phase only
  double bytes_per_token = 1;      // of the held-out text

  std::ostream* progress = nullptr;  // where the progress line goes
  int progress_fd = -1;              // the descriptor behind it: the line is drawn on a terminal only
};

namespace detail {

/// The folder of a run, which one process at a time may use. The lock ends with the process, however it ends.
class RunFolder {
 public:
  explicit RunFolder(const std::filesystem::path& path) : descriptor_(make_and_open(path)) {
    require(descriptor_.get() >= 0, "Trainer: cannot open the folder '", path.string(), "': ", errno_text(errno));
    const int error = ::flock(descriptor_.get(), LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    require(error != EWOULDBLOCK, "Trainer: the folder '", path.string(), "' is in use by another run");
    require(error == 0, "Trainer: cannot lock the folder '", path.string(), "': ", errno_text(error));
    remove_left_over(path, descriptor_.get(), [](std::string_view stem) {
      return stem == "checkpoint.safetensors" || (stem.starts_with("phase-") && stem.ends_with(".safetensors")) ||
             stem == "log.jsonl" || stem == "loss.svg";
    });
  }

 private:
  static int make_and_open(const std::filesystem::path& path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    require(!error, "Trainer: cannot make the folder '", path.string(), "': ", error.message());
    return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  }

  Descriptor descriptor_;
};

/// The shortest text that reads back as the same number.
template <class Number>
std::string number_text(Number value) {
  return nlohmann::json(value).dump();
}

}  // namespace detail

template <class Net, class T = float, class Device = cpu>
class Trainer {
 public:
  using ModelType = Model<Net, T, Device>;

  /// Begins, or continues where the folder's checkpoint is. Model, context and token files must outlive the trainer.
  Trainer(Context<Device>& ctx, ModelType& model, std::vector<Phase> phases, TrainerOptions options);
  Trainer(ModelType& model, std::vector<Phase> phases, TrainerOptions options)
      : Trainer(this_thread_context<Device>(), model, std::move(phases), std::move(options)) {}

  /// To the end of the last phase.
  void run() {
    while (!finished()) run_phase();
  }
  /// To the end of the phase that comes next, or is under way.
  void run_phase();
  /// One step, with the log, measurement and checkpoint that are due after it. Throws where the loss is not finite.
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

 private:
  using Clock = std::chrono::steady_clock;

  void check() const;
  void resume(const std::filesystem::path& checkpoint);
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
  bool due(Index every) const {
    return (every > 0 && step_ % every == 0) || std::binary_search(phase_ends_.begin(), phase_ends_.end(), step_);
  }

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
};

template <class Net, class T, class Device>
Trainer<Net, T, Device>::Trainer(Context<Device>& ctx, ModelType& model, std::vector<Phase> phases,
                                 TrainerOptions options)
    : ctx_(ctx),
      model_(model),
      phases_(std::move(phases)),
      options_(std::move(options)),
      gradients_(model.entries()),
      optimiser_(model, options_.adamw),
      batches_(static_cast<std::size_t>(std::max<Index>(options_.accumulation, 0))) {
  check();
  for (const Phase& phase : phases_) {
    mixtures_.emplace_back(phase.mixture);
    mixtures_.back().check(options_.length);
    const Index before = phase_ends_.empty() ? 0 : phase_ends_.back();
    phase_ends_.push_back(before + (phase.tokens + tokens_per_step() - 1) / tokens_per_step());
  }
  if (options_.progress) progress_.emplace(*options_.progress, options_.progress_fd);
  const std::filesystem::path checkpoint = options_.folder / "checkpoint.safetensors";
  if (!options_.folder.empty()) {
    folder_.emplace(options_.folder);
    if (is_there(checkpoint)) resume(checkpoint);
    log_.emplace(options_.folder / "log.jsonl");
    log_->truncate_after(step_ > 0 ? step_ : -1);
  }
  if (step_ > 0) return;
  if (!options_.start_from.empty()) load_weights(options_.start_from, model_, &optimiser_);
  log_measurement();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::check() const {
  const TrainerOptions& o = options_;
  require(o.rows > 0 && o.length > 0 && o.accumulation > 0,
          "TrainerOptions: rows, length and accumulation must be positive, got ", o.rows, ", ", o.length, " and ",
          o.accumulation);
  require(o.checkpoint_every_steps >= 0 && o.log_every_steps >= 0 && o.evaluate_every_steps >= 0,
          "TrainerOptions: checkpoint_, log_ and evaluate_every_steps must be 0 or more, got ",
          o.checkpoint_every_steps, ", ", o.log_every_steps, " and ", o.evaluate_every_steps);
  require(o.bytes_per_token > 0, "TrainerOptions: bytes_per_token must be positive, got ", o.bytes_per_token);
  require(!phases_.empty(), "Trainer: there is no phase");
  for (const Phase& phase : phases_) {
    require(phase.tokens > 0, "Trainer: phase '", phase.name, "' must have a positive number of tokens, got ",
            phase.tokens);
    phase.rate.check(phase.tokens);
  }
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::run_phase() {
  if (finished()) return;
  const Index end = phase_ends_[phase()];
  while (step_ < end) take_step();
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::take_step() {
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
  if (!std::isfinite(sum))
    fail("Trainer: the loss of step ", step_ + 1, " is ", sum, "; the model is as it was after step ", step_);
  loss_ = sum * scale;
  optimiser_.step(ctx_, model_, gradients_, rate);
  ++step_;

  report(phase, rate, std::chrono::duration<double>(Clock::now() - begin).count());
  if (due(options_.evaluate_every_steps)) log_measurement();
  if (due(options_.checkpoint_every_steps)) save();
}

/// The progress line, and a line of the log.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::report(const Phase& phase, double rate, double seconds) {
  seconds_per_step_ = seconds_per_step_ > 0 ? 0.9 * seconds_per_step_ + 0.1 * seconds : seconds;
  const auto tokens = static_cast<double>(tokens_per_step()), steps_left = static_cast<double>(steps() - step_);
  if (progress_) progress_->update({step_, steps(), loss_, tokens / seconds_per_step_, steps_left * seconds_per_step_});
  if (!log_ || !due(options_.log_every_steps)) return;
  const double norm = optimiser_.gradient_norm();
  log_->append({{"step", step_},
                {"phase", phase.name},
                {"tokens", this->tokens()},
                {"loss", loss_},
                {"learning_rate", rate},
                {"gradient_norm", norm},
                {"time", {{"seconds", seconds}, {"tokens_per_second", tokens / seconds}}}});
  require(std::isfinite(norm), "Trainer: the gradients of step ", step_, " have a norm of ", norm,
          ", so the weights are lost; the last checkpoint is from before it");
}

template <class Net, class T, class Device>
double Trainer<Net, T, Device>::held_out_bits_per_byte() {
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

/// The log is complete up to this step before the checkpoint says so.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::save() {
  if (!folder_) return;
  const auto end = std::find(phase_ends_.begin(), phase_ends_.end(), step_);
  Metadata metadata = arithmetic();
  metadata["step"] = std::to_string(step_);
  metadata["tokens"] = std::to_string(tokens());
  if (end != phase_ends_.end()) {
    draw_loss();
    const std::string name = "phase-" + std::to_string(end - phase_ends_.begin() + 1) + ".safetensors";
    save_checkpoint(options_.folder / name, model_, optimiser_, metadata);
  }
  save_checkpoint(options_.folder / "checkpoint.safetensors", model_, optimiser_, metadata);
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
                {"storage", std::string(name_of(dtype_of<T>()))}};
  for (std::size_t i = 0; i < phases_.size() && (i == 0 || phase_ends_[i - 1] < step_); ++i) {
    const std::string key = "phase " + std::to_string(i + 1) + ".";
    text[key + "name"] = phases_[i].name;
    text[key + "tokens"] = std::to_string(phases_[i].tokens);
    text[key + "rate"] = phases_[i].rate.str();
    text[key + "mixture"] = mixtures_[i].str();
    for (const MixtureSource& source : mixtures_[i].sources())
      text[key + "text of " + source.name] = std::to_string(detail::fingerprint(source.range));
  }
  return text;
}

template <class Net, class T, class Device>
void Trainer<Net, T, Device>::resume(const std::filesystem::path& checkpoint) {
  const Safetensors file = Safetensors::open(checkpoint);
  detail::check_architecture<Net>(file);
  const Index step = metadata_number(file, "step");
  step_ = step;
  std::string differences;
  for (const auto& [key, now] : arithmetic()) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end() || found->second != now)
      differences += "\n  " + key + ": " + (found == file.metadata().end() ? "nothing" : "'" + found->second + "'") +
                     " in the checkpoint, '" + now + "' now";
  }
  require(differences.empty(), "Trainer: '", checkpoint.string(),
          "' was made with other options, and would not be continued exactly:", differences,
          "\nGive the same options, or another folder and this file as start_from.");
  require(step > 0 && step <= steps(), "Trainer: '", checkpoint.string(), "' was at step ", step,
          ", the phases given now end at step ", steps());
  load_checkpoint(file, model_, optimiser_);
}

/// Read from the log, so that the picture of a resumed run is whole.
template <class Net, class T, class Device>
void Trainer<Net, T, Device>::draw_loss() const {
  const double nat = 1 / std::numbers::ln2 / options_.bytes_per_token;
  LinePlot plot{
      .title = "Training", .x_label = "tokens", .y_label = "bits per byte", .curves = {{"training"}, {"held out"}}};
  plot.curves[1].markers = true;
  std::ifstream lines(log_->path());
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    const double x = record.at("tokens");
    if (record.contains("loss")) plot.curves[0].points.push_back({x, nat * record.at("loss").get<double>()});
    if (record.contains("held_out_bits_per_byte"))
      plot.curves[1].points.push_back({x, record.at("held_out_bits_per_byte")});
  }
  if (plot.curves[1].points.empty()) plot.curves.pop_back();
  for (std::size_t i = 0; i < phases_.size() && (i == 0 || phase_ends_[i - 1] < step_); ++i) {
    const Index begin = i > 0 ? phase_ends_[i - 1] : 0, end = phase_ends_[i];
    plot.bands.push_back({phases_[i].name, static_cast<double>(begin * tokens_per_step()),
                          static_cast<double>(end * tokens_per_step())});
  }
  write_line_plot(options_.folder / "loss.svg", plot);
}

}  // namespace zamba
