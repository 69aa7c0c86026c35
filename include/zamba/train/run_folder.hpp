// SPDX-License-Identifier: MIT
// What a Trainer has in its folder beside checkpoints: the folder's lock, and the picture of the losses in its log.
#pragma once

#include <sys/file.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/folder.hpp>
#include <zamba/io/line_plot.hpp>

namespace zamba::detail {

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

/// A number of a record of the log; NaN, which is drawn as a gap, where there is none: JSON has null for NaN.
inline double number_of(const nlohmann::json& record, const char* key) {
  const auto found = record.find(key);
  return found != record.end() && found->is_number() ? found->get<double>() : std::numeric_limits<double>::quiet_NaN();
}

/// Draws the losses of a log over the phases of the run, `bands`. Read from the log, so that the picture of a resumed
/// run is whole.
inline void draw_losses(const std::filesystem::path& log, const std::filesystem::path& picture, double bits_per_nat,
                        std::vector<PlotBand> bands) {
  LinePlot plot{.title = "Training",
                .x_label = "tokens",
                .y_label = "bits per byte",
                .curves = {{"training"}, {"held out"}},
                .bands = std::move(bands)};
  plot.curves[1].markers = true;
  std::ifstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object()) continue;
    const double x = number_of(record, "tokens");
    if (record.contains("loss")) plot.curves[0].points.push_back({x, bits_per_nat * number_of(record, "loss")});
    if (record.contains("held_out_bits_per_byte"))
      plot.curves[1].points.push_back({x, number_of(record, "held_out_bits_per_byte")});
  }
  if (plot.curves[1].points.empty()) plot.curves.pop_back();
  write_line_plot(picture, plot);
}

}  // namespace zamba::detail
