// SPDX-License-Identifier: MIT
// Runs that meet trouble: numbers that are not finite, a log or a picture that cannot be written.
#include <zamba/train/trainer.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include <doctest/doctest.h>

#include "tests/support/nets.hpp"
#include "tests/support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::entry_of;
using zamba_test::error_of;
using zamba_test::has;
using zamba_test::Hybrid;
using zamba_test::read_text;
using zamba_test::small;
using zamba_test::TemporaryFolder;
using zamba_test::Text;
using zamba_test::two_phases;
using zamba_test::weights_of;

template <class ModelType>
void fill(ModelType& model, const std::string& name, double value) {
  const ParameterEntry& entry = entry_of(model, name);
  model.write(entry, std::vector<double>(static_cast<std::size_t>(entry.size), value));
}

/// What of a checkpoint is not finite.
Index non_finite_in(const std::filesystem::path& path) {
  const Safetensors file = Safetensors::open(path);
  Index count = 0;
  for (const TensorEntry& tensor : file.tensors())
    for (const double value : read_values<double>(tensor)) count += !std::isfinite(value);
  return count;
}

struct Setting {
  Index log_every_steps;
  bool folder;
  double clip_norm;
  Keep keep = Keep::everything;
};

/// After three good steps a decay rate of e^100, infinite in float: the loss stays finite, gradients do not.
template <class Net, class T>
void stops_as_it_was(const Setting& setting) {
  CAPTURE(setting.log_every_steps);
  CAPTURE(setting.folder);
  CAPTURE(setting.clip_norm);
  const Text text(4000);
  const TemporaryFolder folder;
  TrainerOptions options = small(setting.folder ? folder.path : std::filesystem::path());
  options.log_every_steps = setting.log_every_steps;
  options.checkpoint_every_steps = setting.folder ? 1 : 0;
  options.adamw.clip_norm = setting.clip_norm;
  options.keep = setting.keep;
  const auto phases = two_phases(text, 4 * 96);
  Model<Net, T> model(Seed{3});
  {
    Trainer trainer(model, phases, options);
    for (int i = 0; i < 3; ++i) trainer.take_step();
    const ParameterEntry& rates = entry_of(model, "layers.0.A_log");
    const auto good = model.read(rates);
    auto bad = good;
    bad[0] = 100;
    model.write(rates, bad);
    const auto before = weights_of(model);
    const double loss = trainer.loss();
    for (const bool whole : {false, true}) {
      const std::string message = error_of([&] { whole ? trainer.run() : trainer.take_step(); });
      INFO(message);
      CHECK(message.starts_with("zamba: Trainer: step 4, in phase 'pretraining', was not taken: "));
      CHECK(has(message, "AdamW: the norm of the gradients is "));
      CHECK(message.ends_with("the model is as it was after step 3"));
      CHECK(weights_of(model) == before);
      CHECK(trainer.step() == 3);
      CHECK(trainer.loss() == loss);
      CHECK(trainer.optimiser().steps() == 3);
      for (const auto& moments : {trainer.optimiser().first_moments(), trainer.optimiser().second_moments()})
        CHECK(std::all_of(moments.data, moments.data + moments.size(), [](auto m) { return std::isfinite(m); }));
    }
    model.write(rates, good);  // mended, it goes on
    trainer.take_step();
    CHECK(trainer.step() == 4);
  }
  if (!setting.folder) return;
  CHECK(non_finite_in(folder.path / "checkpoint.safetensors") == 0);
  Model<Net, T> again(Seed{5});
  Trainer trainer(again, phases, options);
  CHECK(trainer.step() == 4);
  trainer.run();
  CHECK(trainer.finished());
}

}  // namespace

TEST_SUITE("train/trainer_trouble") {
  TEST_CASE("gradients that are not finite are no step, whatever is logged, clipped or kept") {
    for (const Setting& setting :
         {Setting{1, true, 1}, {10, true, 1}, {0, true, 0}, {10, false, 1, Keep::layer_inputs}, {1, false, 0}})
      stops_as_it_was<Hybrid, float>(setting);
    stops_as_it_was<Hybrid, bf16>({10, true, 1});
    stops_as_it_was<zamba_test::Plain, float>({10, true, 0, Keep::layer_inputs});
  }

  TEST_CASE("weights of any size: a step is taken well, or not at all") {
    const Text text(4000);
    for (const Index log_every : {1, 10})
      for (const double size : {1e15, 1e18, 1e20, 1e30, 1e34, 3e36, 1e38}) {
        CAPTURE(size);
        const TemporaryFolder folder;
        TrainerOptions options = small(folder.path);
        options.checkpoint_every_steps = 1;
        options.log_every_steps = log_every;
        Model<Hybrid, float> model(Seed{3});
        fill(model, "final_norm.weight", size);
        Trainer trainer(model, two_phases(text, 10 * 96), options);
        const std::string message = error_of([&] { trainer.run(); });
        for (const double weight : weights_of(model)) REQUIRE(std::isfinite(weight));
        if (message.empty()) CHECK(trainer.finished());
        if (trainer.step() > 0) CHECK(non_finite_in(folder.path / "checkpoint.safetensors") == 0);
      }
  }

  TEST_CASE("what is no number in the log is a gap in the picture, and no trouble") {
    const Text text(4000);
    const TemporaryFolder folder;
    TrainerOptions options = small(folder.path);
    options.held_out = text.parts.held_out;
    Model<Hybrid, float> model(Seed{3});
    Trainer trainer(model, two_phases(text, 4 * 96), options);
    trainer.take_step();
    // As a measurement that is not finite is written, and lines of another program.
    std::ofstream(folder.path / "log.jsonl", std::ios::app) << R"({"step":1,"tokens":96,"held_out_bits_per_byte":null}
{"step":1,"loss":null}
{"step":1,"tokens":"many","loss":[1]}
3
{"step":
)";
    CHECK_NOTHROW(trainer.run());
    CHECK(trainer.finished());
    CHECK(has(read_text(folder.path / "loss.svg"), "</svg>"));
    CHECK(std::filesystem::exists(folder.path / "phase-2.safetensors"));
  }

  TEST_CASE("a picture without a finite point is told of, and no step is lost") {
    const Text text(4000);
    const TemporaryFolder folder;
    TrainerOptions options = small(folder.path);
    options.held_out = text.parts.held_out;
    options.bytes_per_token = 1e-320;  // bits a byte beyond double: null in the log
    Model<Hybrid, float> model(Seed{3});
    Trainer trainer(model, two_phases(text, 4 * 96), options);
    CHECK(has(error_of([&] { trainer.run(); }), "trouble after step 4: LinePlot 'Training': there is no finite point"));
    CHECK(trainer.finished());
    CHECK(has(read_text(folder.path / "log.jsonl"), "\"held_out_bits_per_byte\":null"));
    CHECK(std::filesystem::exists(folder.path / "phase-1.safetensors"));
    CHECK(std::filesystem::exists(folder.path / "phase-2.safetensors"));
    CHECK(Safetensors::open(folder.path / "checkpoint.safetensors").metadata().at("step") == "6");
  }

  TEST_CASE("a log that is removed loses no step and no checkpoint, and is told of at the end") {
    const Text text(4000);
    const TemporaryFolder folder;
    std::ostringstream progress;
    TrainerOptions options = small(folder.path);
    options.progress = &progress;
    Model<Hybrid, float> model(Seed{3});
    Trainer trainer(model, two_phases(text, 6 * 96), options);
    for (int i = 0; i < 5; ++i) trainer.take_step();
    std::filesystem::remove(folder.path / "log.jsonl");
    const std::string message = error_of([&] { trainer.run(); });
    CHECK(has(message,
              "zamba: Trainer: 9 of 9 steps are taken, the checkpoint is written, and the run can go on; but "
              "there was trouble after step 6: StepLog: '" +
                  (folder.path / "log.jsonl").string() + "' was removed or replaced"));
    CHECK(has(progress.str(), "Trainer: trouble after step 6: StepLog: '"));
    CHECK(trainer.finished());
    CHECK(trainer.trouble() == "");
    CHECK_NOTHROW(trainer.run());  // told once
    CHECK(read_text(folder.path / "phase-2.safetensors") == read_text(folder.path / "checkpoint.safetensors"));
    CHECK(std::filesystem::exists(folder.path / "phase-1.safetensors"));
    const std::string log = read_text(folder.path / "log.jsonl");
    CHECK(std::count(log.begin(), log.end(), '\n') == 3);  // the steps of the second phase
    // The same steps as of a run that met no trouble.
    const TemporaryFolder whole;
    Model<Hybrid, float> other(Seed{3});
    Trainer(other, two_phases(text, 6 * 96), small(whole.path)).run();
    CHECK(weights_of(model) == weights_of(other));
  }

  TEST_CASE("a picture that cannot be written is told of when the phase's checkpoint is there") {
    const Text text(4000);
    const TemporaryFolder folder;
    std::filesystem::create_directories(folder.path / "loss.svg" / "in the way");
    Model<Hybrid, float> model(Seed{3});
    const auto phases = two_phases(text, 4 * 96);
    Trainer trainer(model, phases, small(folder.path));
    for (int i = 0; i < 3; ++i) CHECK_NOTHROW(trainer.take_step());
    CHECK(
        has(error_of([&] { trainer.take_step(); }),
            "Trainer: 4 of 6 steps are taken, the checkpoint is written, and the run can go on; but there was trouble "
            "after step 4: cannot write '" +
                (folder.path / "loss.svg").string() + "'"));
    CHECK(std::filesystem::exists(folder.path / "phase-1.safetensors"));
    CHECK(Safetensors::open(folder.path / "checkpoint.safetensors").metadata().at("step") == "4");
    CHECK(has(error_of([&] { trainer.run_phase(); }), "6 of 6 steps are taken"));
    CHECK(std::filesystem::exists(folder.path / "phase-2.safetensors"));
  }

  TEST_CASE("a run that was killed before its picture draws it when it is made again") {
    const Text text(4000);
    const TemporaryFolder folder;
    Model<Hybrid, float> model(Seed{3});
    const auto phases = two_phases(text, 4 * 96);
    Trainer(model, phases, small(folder.path)).run();
    const std::string picture = read_text(folder.path / "loss.svg");
    std::filesystem::remove(folder.path / "loss.svg");
    zamba_test::write_text(folder.path / "loss.svg.tmp-1-0", "left");
    const Trainer again(model, phases, small(folder.path));
    CHECK(read_text(folder.path / "loss.svg") == picture);
    CHECK(!std::filesystem::exists(folder.path / "loss.svg.tmp-1-0"));
  }

  TEST_CASE("a stream that throws when it is told of trouble is no end of a run") {
    const Text text(4000);
    const TemporaryFolder folder;
    std::filesystem::create_directories(folder.path / "loss.svg" / "in the way");
    std::ostringstream progress;
    progress.setstate(std::ios::badbit);
    CHECK_THROWS_AS(progress.exceptions(std::ios::badbit), std::ios::failure);
    TrainerOptions options = small(folder.path);
    options.progress = &progress;
    Model<Hybrid, float> model(Seed{3});
    Trainer trainer(model, two_phases(text, 4 * 96), options);
    CHECK(has(error_of([&] { trainer.run(); }), "there was trouble after step 4: cannot write '"));
    CHECK(trainer.finished());
    CHECK(std::filesystem::exists(folder.path / "phase-2.safetensors"));
  }

  TEST_CASE("a checkpoint with a number that is not finite is not continued, and its log stays") {
    const Text text(4000);
    const TemporaryFolder folder;
    const auto phases = two_phases(text, 4 * 96);
    const auto checkpoint = folder.path / "checkpoint.safetensors";
    Model<Hybrid, float> model(Seed{3});
    Trainer(model, phases, small(folder.path)).run_phase();
    {
      const Safetensors good = Safetensors::open(checkpoint);
      std::vector<TensorSource> tensors;
      std::vector<float> damaged;
      for (const TensorEntry& tensor : good.tensors()) {
        tensors.push_back({tensor.name, tensor.dtype, tensor.shape, [&tensor] { return tensor.bytes; }});
        if (tensor.name != "weights.layers.1.D") continue;
        damaged = read_values<float>(tensor);
        damaged[2] = std::nanf("");
        tensors.back().bytes = [&damaged] { return std::as_bytes(std::span(damaged)); };
      }
      write_safetensors(checkpoint, tensors, good.metadata());
    }
    const std::string log = read_text(folder.path / "log.jsonl") + "{\"step\":9}\n";
    zamba_test::write_text(folder.path / "log.jsonl", log);
    Model<Hybrid, float> again(Seed{5});
    const auto before = weights_of(again);
    const std::string message = error_of([&] { Trainer(again, phases, small(folder.path)); });
    CHECK(has(message, "weights.layers.1.D: value 2 is NaN or infinite"));
    CHECK(weights_of(again) == before);
    CHECK(read_text(folder.path / "log.jsonl") == log);
  }

  TEST_CASE("weights to start from that are refused leave the model and the log as they were") {
    const Text text(4000);
    const TemporaryFolder folder;
    zamba_test::write_text(folder.path / "log.jsonl", "{\"step\":3}\n");
    zamba_test::write_text(folder.path / "damaged.safetensors", "no tensors");
    TrainerOptions options = small(folder.path);
    options.start_from = folder.path / "damaged.safetensors";
    Model<Hybrid, float> model(Seed{3});
    const auto before = weights_of(model);
    CHECK_THROWS_AS(Trainer(model, two_phases(text, 4 * 96), options), Error);
    CHECK(weights_of(model) == before);
    CHECK(read_text(folder.path / "log.jsonl") == "{\"step\":3}\n");
  }
}
