// SPDX-License-Identifier: MIT
// Runs that are told of their steps, and stopped between them: from the callback, another thread, a signal handler.
#include <zamba/train/trainer.hpp>

#include <atomic>
#include <csignal>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "tests/support/nets.hpp"
#include "tests/support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::error_of;
using zamba_test::has;
using zamba_test::Hybrid;
using zamba_test::log_without_times;
using zamba_test::read_text;
using zamba_test::small;
using zamba_test::TemporaryFolder;
using zamba_test::Text;
using zamba_test::two_phases;

using HybridRun = Trainer<Hybrid, float, cpu>;

/// A run of 15 steps, its phases' ends at 10 and 15; a checkpoint every fourth step.
TrainerOptions every_fourth(const std::filesystem::path& folder, const Text& text) {
  TrainerOptions options = small(folder);
  options.checkpoint_every_steps = 4;
  options.held_out = text.parts.held_out;
  options.evaluate_every_steps = 6;
  return options;
}

Index saved_step(const std::filesystem::path& folder) {
  return metadata_number(Safetensors::open(folder / "checkpoint.safetensors"), "step");
}

void check_same_run(const std::filesystem::path& one, const std::filesystem::path& other) {
  for (const char* name : {"checkpoint.safetensors", "phase-1.safetensors", "phase-2.safetensors", "loss.svg"}) {
    CAPTURE(name);
    CHECK((read_text(one / name) == read_text(other / name)));
  }
  CHECK(log_without_times(one / "log.jsonl") == log_without_times(other / "log.jsonl"));
}

/// A run that nothing stops.
struct Whole {
  explicit Whole(const Text& text) {
    Model<Hybrid, float> model(Seed{3});
    HybridRun(model, two_phases(text, 10 * 96), every_fourth(folder.path, text)).run();
  }
  TemporaryFolder folder;
};

std::atomic<HybridRun*> run_of_signals{nullptr};
extern "C" void stop_on_signal(int) { run_of_signals.load()->stop(); }

}  // namespace

TEST_SUITE("train/trainer_stop") {
  TEST_CASE("on_step is told what the log is, after the step's checkpoint") {
    const Text text(4000);
    const Whole whole(text);
    const TemporaryFolder folder;
    TrainerOptions options = every_fourth(folder.path, text);
    std::string told;
    options.on_step = [&](const StepReport& report) {
      CHECK(report.seconds > 0);
      if (report.step % 4 == 0 || report.step == 10 || report.step == 15) CHECK(saved_step(folder.path) == report.step);
      const nlohmann::json record{{"step", report.step},          {"phase", report.phase},
                                  {"tokens", report.tokens},      {"loss", report.loss},
                                  {"learning_rate", report.rate}, {"gradient_norm", report.gradient_norm}};
      told += record.dump() + "\n";
      const std::string log = log_without_times(folder.path / "log.jsonl");
      CHECK(has(log, record.dump()));
    };
    Model<Hybrid, float> model(Seed{3});
    HybridRun(model, two_phases(text, 10 * 96), options).run();
    CHECK(std::count(told.begin(), told.end(), '\n') == 15);
    CHECK(has(told, R"("phase":"pretraining","step":10,"tokens":960)"));
    CHECK(has(told, R"("phase":"annealing","step":11,"tokens":1056)"));
    check_same_run(folder.path, whole.folder.path);
  }

  TEST_CASE("what on_step throws ends the run with an Error, and the step is whole") {
    const Text text(4000);
    const Whole whole(text);
    const TemporaryFolder folder;
    TrainerOptions options = every_fourth(folder.path, text);
    options.on_step = [&](const StepReport& report) {
      if (report.step == 8) throw std::runtime_error("the listener is gone");
      if (report.step == 10) throw Error("zamba: full");
      if (report.step == 11) throw 11;
    };
    Model<Hybrid, float> model(Seed{3});
    HybridRun run(model, two_phases(text, 10 * 96), options);
    CHECK(error_of([&] { run.run(); }) ==
          "zamba: Trainer: on_step threw, after step 8 of 15: the listener is gone; the step is whole, and the run can "
          "go on");
    CHECK(run.step() == 8);
    CHECK(!run.stopped());
    CHECK(saved_step(folder.path) == 8);
    CHECK(has(error_of([&] { run.run_phase(); }), "on_step threw, after step 10 of 15: full; the step is whole"));
    CHECK(std::filesystem::exists(folder.path / "phase-1.safetensors"));
    CHECK_THROWS_AS(run.take_step(), int);
    CHECK(run.step() == 11);
    run.run();
    CHECK(run.finished());
    check_same_run(folder.path, whole.folder.path);
  }

  TEST_CASE("stopped at any step, gone on with or made again, a run ends bit-equal") {
    const Text text(4000);
    const Whole whole(text);
    for (const bool made_again : {false, true}) {
      CAPTURE(made_again);
      const TemporaryFolder folder;
      TrainerOptions options = every_fourth(folder.path, text);
      std::optional<HybridRun> run;
      options.on_step = [&](const StepReport& report) {
        if (report.step % 3 == 1 || report.step == 10) run->stop();
      };
      Model<Hybrid, float> model(Seed{3});
      run.emplace(model, two_phases(text, 10 * 96), options);
      for (const Index step : {1, 4, 7, 10, 13}) {
        run->run();
        CHECK(run->step() == step);
        CHECK(run->stopped());
        CHECK(!run->finished());
        CHECK(saved_step(folder.path) == step);
        if (!made_again) continue;
        run.reset();
        model = Model<Hybrid, float>(Seed{4});
        run.emplace(model, two_phases(text, 10 * 96), options);
        CHECK(run->step() == step);
        CHECK(!run->stopped());
      }
      run->run();
      CHECK(run->finished());
      CHECK(!run->stopped());
      check_same_run(folder.path, whole.folder.path);
    }
  }

  TEST_CASE("stopped from another thread, again and again, a run ends bit-equal") {
    const Text text(4000);
    const Whole whole(text);
    const TemporaryFolder folder;
    TrainerOptions options = every_fourth(folder.path, text);
    std::atomic<Index> reached{0};
    options.on_step = [&](const StepReport& report) { reached = report.step; };
    Model<Hybrid, float> model(Seed{3});
    HybridRun run(model, two_phases(text, 10 * 96), options);
    int stops = 0;
    for (const Index until : {2, 5, 8, 11}) {
      std::thread stopper([&] {
        while (reached < until) std::this_thread::yield();
        run.stop();
      });
      run.run();
      stopper.join();
      CHECK(run.step() >= until);
      stops += run.stopped() && !run.finished();
      if (run.stopped() && !run.finished()) CHECK(saved_step(folder.path) == run.step());
    }
    CHECK(stops >= 1);
    while (!run.finished()) run.run();  // a stop that came after the last of these calls had ended is of the next
    check_same_run(folder.path, whole.folder.path);
  }

  TEST_CASE("a signal handler stops a run, as a program does that is asked to end") {
    const Text text(4000);
    const TemporaryFolder folder;
    TrainerOptions options = every_fourth(folder.path, text);
    options.on_step = [](const StepReport& report) {
      if (report.step == 5) std::raise(SIGTERM);
    };
    Model<Hybrid, float> model(Seed{3});
    HybridRun run(model, two_phases(text, 10 * 96), options);
    run_of_signals = &run;
    const auto before = std::signal(SIGTERM, stop_on_signal);
    run.run();
    std::signal(SIGTERM, before);
    CHECK(run.stopped());
    CHECK(run.step() == 5);
    CHECK(saved_step(folder.path) == 5);
  }

  TEST_CASE("a stop before a run is met before its first step, once") {
    const Text text(4000);
    const TemporaryFolder folder;
    Model<Hybrid, float> model(Seed{3});
    const auto before = zamba_test::weights_of(model);
    HybridRun run(model, two_phases(text, 10 * 96), every_fourth(folder.path, text));
    run.stop();
    run.stop();
    run.run();
    CHECK(run.stopped());
    CHECK(run.step() == 0);
    CHECK(zamba_test::weights_of(model) == before);
    CHECK(!std::filesystem::exists(folder.path / "checkpoint.safetensors"));  // there is nothing to keep yet
    run.stop();
    run.take_step();  // takes its step all the same
    CHECK(run.stopped());
    CHECK(run.step() == 1);
    CHECK(saved_step(folder.path) == 1);
    run.take_step();
    CHECK(!run.stopped());
    CHECK(saved_step(folder.path) == 1);
    run.run_phase();
    CHECK(!run.stopped());
    CHECK(run.step() == 10);
    run.stop();
    run.run_phase();
    CHECK(run.stopped());
    CHECK(run.step() == 10);
    run.run();
    CHECK(!run.stopped());
    CHECK(run.finished());
  }

  TEST_CASE("a stop that meets the end of a phase or of the run is not lost") {
    const Text text(4000);
    TrainerOptions options = small();
    HybridRun* running = nullptr;
    options.on_step = [&](const StepReport& report) {
      if (report.step == 10 || report.step == 15) running->stop();
    };
    Model<Hybrid, float> model(Seed{3});
    HybridRun run(model, two_phases(text, 10 * 96), options);
    running = &run;
    run.run_phase();
    CHECK(run.step() == 10);
    CHECK(run.stopped());
    run.run_phase();
    CHECK(run.finished());
    CHECK(run.stopped());
    run.run();
    CHECK(!run.stopped());
  }

  TEST_CASE("a run that is stopped tells its trouble, and its checkpoint is written before") {
    const Text text(4000);
    const TemporaryFolder folder;
    TrainerOptions options = small(folder.path);
    HybridRun* running = nullptr;
    options.on_step = [&](const StepReport& report) {
      if (report.step == 2) std::filesystem::remove(folder.path / "log.jsonl");
      if (report.step == 3) running->stop();
    };
    Model<Hybrid, float> model(Seed{3});
    HybridRun run(model, two_phases(text, 10 * 96), options);
    running = &run;
    CHECK(
        has(error_of([&] { run.run(); }),
            "Trainer: 3 of 15 steps are taken, the checkpoint is written, and the run can go on; but there was trouble "
            "after step 3: StepLog: '"));
    CHECK(run.stopped());
    CHECK(saved_step(folder.path) == 3);
    run.run();
    CHECK(run.finished());
  }
}
