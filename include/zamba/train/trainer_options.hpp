// SPDX-License-Identifier: MIT
// TrainerOptions: how a run is trained, where it is kept, what it is measured by, and who is told of its steps.
#pragma once

#include <filesystem>
#include <functional>
#include <ostream>
#include <string_view>

#include <zamba/data/mixture.hpp>
#include <zamba/error.hpp>
#include <zamba/number.hpp>
#include <zamba/random.hpp>
#include <zamba/residual_io.hpp>
#include <zamba/train/adamw.hpp>

namespace zamba {

/// A step that was taken.
struct StepReport {
  Index step = 0;            // how many were, this one included
  std::string_view phase{};  // its name
  double loss = 0;           // in nats per target
  double rate = 0;           // of the schedule
  double gradient_norm = 0;  // before clipping, without frozen parameters
  Index tokens = 0;          // of the run so far
  double seconds = 0;        // that the step took
};

struct TrainerOptions {
  Index rows = 8;          // windows in a micro-batch
  Index length = 1024;     // tokens of a window
  Index accumulation = 1;  // micro-batches in a step
  double z_loss = 0;       // times the square of the log-normaliser of a target's logits, added to its loss: 1e-4 keeps
                           // logits small; losses in log and reports contain it, measurements do not
  AdamWOptions adamw{};
  Seed seed{};                   // of the batches
  Keep keep = Keep::everything;  // of a forward pass: less takes more time, and comes to the same numbers

  std::filesystem::path folder{};      // empty: nothing is written
  std::filesystem::path start_from{};  // weights, and no moments, of another run's checkpoint; once the folder has one
                                       // of its own, the run goes on from that
  Index checkpoint_every_steps = 0;    // 0: at the end of each phase only; needs a folder
  Index log_every_steps = 1;           // where there is a folder; 0: at the end of each phase only

  TokenRange held_out{};           // none: no measurements
  Index evaluate_every_steps = 0;  // 0: at the beginning and at the end of each phase only; for the log in the folder
  double bytes_per_token = 1;      // of the texts, for bits per byte

  std::ostream* progress = nullptr;  // where the progress line goes, and trouble that ends no run
  int progress_fd = -1;              // the descriptor behind it: the line is drawn on a terminal only

  /// Called after each step, and after the log, measurement and checkpoint that are due then. What it throws ends the
  /// run with an Error; the step is whole, and the run can go on.
  std::function<void(const StepReport&)> on_step{};

  /// Throws where a value makes no sense or would be ignored, naming it.
  void check() const;
};

inline void TrainerOptions::check() const {
  require(rows > 0 && length > 0 && accumulation > 0,
          "TrainerOptions: rows, length and accumulation must be positive, got ", rows, ", ", length, " and ",
          accumulation);
  require(rows <= most_batch_tokens / length && accumulation <= most_batch_tokens / (rows * length),
          "TrainerOptions: rows x length x accumulation may be ", most_batch_tokens, " tokens, got ", rows, " x ",
          length, " x ", accumulation);
  require(keep != Keep::nothing, "TrainerOptions: Keep::nothing leaves no way back; layer_inputs is the least");
  require(is_finite(z_loss) && z_loss >= 0, "TrainerOptions: z_loss must be finite and 0 or more, got ", z_loss);
  require(checkpoint_every_steps >= 0 && log_every_steps >= 0 && evaluate_every_steps >= 0,
          "TrainerOptions: checkpoint_, log_ and evaluate_every_steps must be 0 or more, got ", checkpoint_every_steps,
          ", ", log_every_steps, " and ", evaluate_every_steps);
  require(is_finite(bytes_per_token) && bytes_per_token > 0, "TrainerOptions: bytes_per_token must be positive, got ",
          bytes_per_token);
  // What would do nothing.
  require(checkpoint_every_steps == 0 || !folder.empty(), "TrainerOptions: checkpoint_every_steps is ",
          checkpoint_every_steps, ", but there is no folder for checkpoints");
  require(evaluate_every_steps == 0 || held_out.file, "TrainerOptions: evaluate_every_steps is ", evaluate_every_steps,
          ", but there is no held_out text to measure");
  require(evaluate_every_steps == 0 || !folder.empty(), "TrainerOptions: evaluate_every_steps is ",
          evaluate_every_steps, ", but there is no folder for the log that measurements go to");
  require(held_out.file || (held_out.first == 0 && held_out.last == 0),
          "TrainerOptions: held_out is a range without a file");
  require(bytes_per_token == 1 || !folder.empty() || held_out.file, "TrainerOptions: bytes_per_token is ",
          bytes_per_token, ", but there is neither a held_out text nor a folder for a picture");
  require(progress_fd < 0 || progress, "TrainerOptions: progress_fd is ", progress_fd, ", but there is no progress");
}

}  // namespace zamba
