// SPDX-License-Identifier: MIT
// What a run tells while it runs: ProgressLine for a person, StepLog for a program; and numbers in readable form.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>
#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/number.hpp>

namespace zamba {

/// "42 s", "3 min 05 s", "1 h 02 min", "2 d 03 h"; "?" for what is not known or negative.
inline std::string format_duration(double seconds) {
  if (!(seconds >= 0 && seconds < 1e9)) return "?";
  const auto pair = [](Index large, const char* unit, Index small, const char* small_unit) {
    return std::to_string(large) + unit + (small < 10 ? "0" : "") + std::to_string(small) + small_unit;
  };
  const auto s = static_cast<Index>(std::lround(seconds)), min = s / 60, h = min / 60;
  if (s < 60) return std::to_string(s) + " s";
  if (h == 0) return pair(min, " min ", s % 60, " s");
  if (h < 24) return pair(h, " h ", min % 60, " min");
  return pair(h / 24, " d ", h % 24, " h");
}

/// "950", "12.3 k", "1.2 M", "7.2 B", "1.5 T": one digit after the point above 1000; "?" for what is not known.
inline std::string format_count(double count) {
  if (!is_finite(count)) return "?";
  const char* unit = "";
  for (const char* next : {" k", " M", " B", " T"}) {
    // What would print as 1000.0 takes the next unit.
    if (std::abs(count) < (*unit ? 999.95 : 999.5)) break;
    count /= 1000;
    unit = next;
  }
  char text[64];
  std::snprintf(text, sizeof text, *unit ? "%.1f%s" : "%.0f%s", count, unit);
  return text;
}

namespace detail {

/// The message of another error as part of one.
inline std::string without_prefix(std::string_view message) {
  return std::string(message.starts_with("zamba: ") ? message.substr(7) : message);
}

}  // namespace detail

/// Where a run is.
struct Progress {
  Index step = 0, steps = 0;
  double loss = 0;
  double tokens_per_second = 0;
  double seconds_left = 0;
};

/// One line, written again in place; and nothing at all where the stream is not a terminal.
class ProgressLine {
 public:
  /// out: where to; fd: the descriptor behind it, asked whether it is a terminal, for instance (std::cerr, 2).
  ProgressLine(std::ostream& out, int fd) : ProgressLine(out, ::isatty(fd) == 1, std::chrono::milliseconds(100)) {}
  /// terminal: whether to write; between two updates there is at least `interval`.
  ProgressLine(std::ostream& out, bool terminal, std::chrono::steady_clock::duration interval)
      : out_(out), terminal_(terminal), interval_(interval) {}
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine() {
    try {
      finish();
    } catch (...) {  // a stream that throws must not end the program here
    }
  }

  void update(const Progress& progress) {
    if (!terminal_) return;
    const auto now = std::chrono::steady_clock::now();
    if (open_ && now - last_ < interval_ && progress.step < progress.steps) return;
    char loss[32];
    std::snprintf(loss, sizeof loss, "%.4f", progress.loss);
    out_ << "\rstep " << progress.step << "/" << progress.steps << "  loss " << loss << "  "
         << format_count(progress.tokens_per_second) << " tokens/s  " << format_duration(progress.seconds_left)
         << " left\x1b[K" << std::flush;  // clears what a longer line left behind
    last_ = now;
    open_ = true;
  }

  /// Ends the line, so that something else can be written.
  void finish() {
    if (std::exchange(open_, false)) out_ << "\n" << std::flush;
  }

 private:
  std::ostream& out_;
  bool terminal_;
  std::chrono::steady_clock::duration interval_;
  std::chrono::steady_clock::time_point last_;
  bool open_ = false;  // a line is on the screen, without its end
};

/// A log of one JSON object a line, given to the system line by line: a killed program loses at most the line it was
/// writing; what was there at sync() outlives the machine. An exact resume from the checkpoint of step s begins with
/// truncate_after(s). Numbers keep all their digits; JSON has no NaN, which becomes null. A line that could not be
/// written is taken back, so that the next one stands in a whole file.
class StepLog {
 public:
  /// Appends to the file, or makes it. What a killed program left of its last line is removed.
  explicit StepLog(std::filesystem::path path) : path_(std::move(path)) {
    if (is_there(path_)) keep([](const auto&) { return true; });
    open();
  }

  const std::filesystem::path& path() const { return path_; }

  /// Text that is not UTF-8 gets replacement characters.
  void append(const nlohmann::ordered_json& record) {
    const std::string line = record.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    if (!record.is_object())
      fail("StepLog '", path_.string(), "': a record is a JSON object, got ", line.substr(0, line.size() - 1));
    try {
      FileWriter out(file_->get());
      out.write(std::string_view(line));
      out.flush();
    } catch (const std::exception& error) {
      const bool taken_back = ::ftruncate(file_->get(), size_) == 0;
      fail("StepLog: cannot write to '", path_.string(), "': ", detail::without_prefix(error.what()),
           taken_back ? "" : "; a part of the line may stand there");
    }
    size_ += static_cast<off_t>(line.size());
  }

  /// Returns when the disk has what was appended. Throws where it has not, or the file was removed or replaced
  /// meanwhile: then what comes next goes to a new one.
  void sync() {
    struct stat status {};
    const bool known = ::fstat(file_->get(), &status) == 0;
    if (known && status.st_nlink == 0) {
      open();
      fail("StepLog: '", path_.string(), "' was removed or replaced while it was written to");
    }
    while (::fsync(file_->get()) != 0 && errno != EINVAL)
      if (errno != EINTR)
        fail("StepLog: '", path_.string(), "' was not flushed to the disk: ", detail::errno_text(errno));
  }

  /// Removes every record whose "step" is above the given one. Records without a step stay.
  void truncate_after(Index step) {
    keep([step](const nlohmann::json& record) {
      const auto found = record.find("step");
      return found == record.end() || !found->is_number() || found->get<double>() <= static_cast<double>(step);
    });
    open();
  }

 private:
  void open() {
    file_.emplace(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666));
    struct stat status {};
    if (file_->get() < 0 || ::fstat(file_->get(), &status) != 0)
      fail("StepLog: cannot open '", path_.string(), "' for writing: ", detail::errno_text(errno));
    require(S_ISREG(status.st_mode), "StepLog: '", path_.string(), "' is no regular file");
    size_ = status.st_size;
  }

  /// Replaces the file by the lines that `wanted` accepts; leaves it alone where that is all of it.
  template <class F>
  void keep(F&& wanted) {
    std::string kept;
    const MappedFile file(path_);
    const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    Index number = 1;
    for (std::size_t begin = 0; begin < text.size(); ++number) {
      const std::size_t end = text.find('\n', begin);
      const std::string_view line = text.substr(begin, end == std::string_view::npos ? end : end - begin);
      begin = end == std::string_view::npos ? text.size() : end + 1;
      const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!record.is_object() && end == std::string_view::npos) break;  // the line that was being written
      require(record.is_object(), "StepLog '", path_.string(), "': line ", number, " is not a JSON object");
      if (wanted(record)) kept.append(line) += '\n';
    }
    if (kept != text) replace_file(path_, [&](FileWriter& out) { out.write(std::string_view(kept)); });
  }

  std::filesystem::path path_;
  std::optional<detail::Descriptor> file_;
  off_t size_ = 0;  // of the lines that are whole
};

}  // namespace zamba
