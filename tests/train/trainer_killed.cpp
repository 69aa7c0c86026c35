// SPDX-License-Identifier: MIT
// A run that is killed, or asked to end, again and again ends with the bytes of one that was not.
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <thread>

#include <doctest/doctest.h>

#include <zamba/train/trainer.hpp>

#include "tests/support/nets.hpp"
#include "tests/support/temporary_folder.hpp"
#include "tests/support/training.hpp"

extern char** environ;

namespace {

using namespace zamba;
using zamba_test::has;
using zamba_test::log_without_times;
using zamba_test::read_text;

constexpr const char* folder_variable = "ZAMBA_TEST_TRAINER_FOLDER";
constexpr Index first_phase = 36, second_phase = 24;

/// This program again, running only the case below in `folder`. A new process, because a fork would inherit the
/// threads of OpenMP as memory without life.
pid_t start(const std::filesystem::path& folder) {
  ::setenv(folder_variable, folder.c_str(), 1);
  std::string arguments[] = {"trainer", "--no-skip", "--test-case=the run of a child process", "--minimal"};
  char* argv[] = {arguments[0].data(), arguments[1].data(), arguments[2].data(), arguments[3].data(), nullptr};
  posix_spawn_file_actions_t files;
  ::posix_spawn_file_actions_init(&files);
  ::posix_spawn_file_actions_addopen(&files, 1, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  const int error = ::posix_spawn(&child, "/proc/self/exe", &files, nullptr, argv, environ);
  ::posix_spawn_file_actions_destroy(&files);
  ::unsetenv(folder_variable);
  REQUIRE(error == 0);
  return child;
}

bool ended(pid_t child, int& status) { return ::waitpid(child, &status, WNOHANG) == child; }

Index lines(const std::filesystem::path& path) {
  const std::string text = read_text(path);
  return std::count(text.begin(), text.end(), '\n');
}

/// A checkpoint that is being written, or was when its writer was killed.
bool half_written(const std::filesystem::path& folder) {
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error))
    if (file.path().filename().string().find(".safetensors.tmp-") != std::string::npos) return true;
  return false;
}

/// The run of a child process, for its handler.
std::atomic<Trainer<zamba_test::Hybrid, bf16>*> run_to_stop{nullptr};
extern "C" void stop_when_asked_to_end(int) {
  if (auto* const run = run_to_stop.load()) run->stop();
}

}  // namespace

TEST_SUITE("train/trainer_killed") {
  TEST_CASE("the run of a child process" * doctest::skip()) {
    const char* folder = std::getenv(folder_variable);
    if (!folder) return;  // the program was asked to run all cases
    const std::filesystem::path path(folder);
    const TokenFile file = TokenFile::open(path.parent_path() / "text", TokenWidth::u16, 0);
    const TrainHeldOut parts = split(TokenRange::whole(file), 0.1);
    Context<cpu> ctx(2);
    Model<zamba_test::Hybrid, bf16> model(Seed{3});
    const std::vector<Phase> phases = {
        {"pretraining",
         first_phase * 64,
         LearningRate::warm_up(4e-3, {.tokens = 256}).then(LearningRate::cosine(4e-3, 2e-3)),
         {{parts.train, 1, "text"}}},
        {"annealing", second_phase * 64, LearningRate::exponential(2e-3, 1e-4), {{parts.train, 1, "text"}}}};
    Trainer trainer(ctx, model, phases,
                    {.rows = 2,
                     .length = 16,
                     .accumulation = 2,
                     .folder = path,
                     .checkpoint_every_steps = 3,
                     .held_out = parts.held_out,
                     .evaluate_every_steps = 7});
    run_to_stop = &trainer;
    std::signal(SIGTERM, stop_when_asked_to_end);
    trainer.run();
  }

  TEST_CASE("killed at any moment and started again, a run ends bit-equal") {
    const zamba_test::TemporaryFolder folder;
    write_token_file(folder.path / "text", zamba_test::random_tokens(3000), TokenWidth::u16);
    const auto whole = folder.path / "whole", killed = folder.path / "killed";
    int status = 0;
    ::waitpid(start(whole), &status, 0);
    REQUIRE(status == 0);
    const Index all_lines = lines(whole / "log.jsonl");
    REQUIRE(all_lines == first_phase + second_phase + 11);  // steps; measurements at 0, 7, ..., 56, and at 36 and 60

    // Killed when its log has grown by a ninth: at once, after some time, or as soon as it writes a checkpoint.
    Random random(Seed{static_cast<std::uint64_t>(::getpid())}, 0);
    int kills = 0, kills_while_writing = 0;
    for (Index i = 1; i <= 8; ++i) {
      const pid_t child = start(killed);
      const bool wait_for_writing = i % 2 == 0;
      const auto give_up = std::chrono::steady_clock::now() + std::chrono::minutes(2);
      bool gone = false;
      while (!gone && lines(killed / "log.jsonl") < i * all_lines / 9) {
        gone = ended(child, status);
        REQUIRE(std::chrono::steady_clock::now() < give_up);
      }
      if (!wait_for_writing) std::this_thread::sleep_for(std::chrono::microseconds(random.below(4000)));
      while (wait_for_writing && !gone && !half_written(killed)) gone = ended(child, status);
      REQUIRE_MESSAGE(!gone, "the run ended, with status " << status << ", before it was killed " << i << " times");
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      kills += WIFSIGNALED(status);
      kills_while_writing += half_written(killed);
      CHECK_NOTHROW(std::filesystem::exists(killed / "checkpoint.safetensors")
                        ? static_cast<void>(Safetensors::open(killed / "checkpoint.safetensors"))
                        : void());
    }
    CHECK(kills >= 6);
    CHECK(kills_while_writing >= 1);
    MESSAGE(kills << " kills, " << kills_while_writing << " of them while a checkpoint was being written");

    ::waitpid(start(killed), &status, 0);
    REQUIRE(status == 0);
    for (const char* name : {"checkpoint.safetensors", "phase-1.safetensors", "phase-2.safetensors", "loss.svg"}) {
      CAPTURE(name);
      CHECK((read_text(whole / name) == read_text(killed / name)));
    }
    CHECK(log_without_times(whole / "log.jsonl") == log_without_times(killed / "log.jsonl"));
    CHECK(!half_written(killed));
  }

  TEST_CASE("asked to end by SIGTERM and started again, a run ends bit-equal") {
    const zamba_test::TemporaryFolder folder;
    write_token_file(folder.path / "text", zamba_test::random_tokens(3000), TokenWidth::u16);
    const auto whole = folder.path / "whole", stopped = folder.path / "stopped";
    int status = 0;
    ::waitpid(start(whole), &status, 0);
    REQUIRE(status == 0);
    const Index all_lines = lines(whole / "log.jsonl");
    for (Index i = 1; i <= 3; ++i) {
      const pid_t child = start(stopped);
      const Index before = lines(stopped / "log.jsonl");
      const auto give_up = std::chrono::steady_clock::now() + std::chrono::minutes(2);
      while (lines(stopped / "log.jsonl") < before + 5) {  // its handler is there before it has taken steps
        REQUIRE(!ended(child, status));
        REQUIRE(std::chrono::steady_clock::now() < give_up);
      }
      ::kill(child, SIGTERM);
      ::waitpid(child, &status, 0);
      REQUIRE(status == 0);  // it ended by itself
      const Index written = lines(stopped / "log.jsonl");
      REQUIRE(written < all_lines);
      // The log is complete up to the checkpoint, which is of the last step.
      const Index step = metadata_number(Safetensors::open(stopped / "checkpoint.safetensors"), "step");
      CHECK(has(read_text(stopped / "log.jsonl"), "{\"step\":" + std::to_string(step) + ","));
      CHECK(!has(read_text(stopped / "log.jsonl"), "{\"step\":" + std::to_string(step + 1) + ","));
    }
    ::waitpid(start(stopped), &status, 0);
    REQUIRE(status == 0);
    for (const char* name : {"checkpoint.safetensors", "phase-1.safetensors", "phase-2.safetensors", "loss.svg"}) {
      CAPTURE(name);
      CHECK((read_text(whole / name) == read_text(stopped / name)));
    }
    CHECK(log_without_times(whole / "log.jsonl") == log_without_times(stopped / "log.jsonl"));
  }
}
