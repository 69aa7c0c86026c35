// SPDX-License-Identifier: MIT
#include <zamba/train/trainer.hpp>

#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <sstream>

#include <doctest/doctest.h>

#include "tests/support/allocation_count.hpp"
#include "tests/support/nets.hpp"
#include "tests/support/temporary_folder.hpp"
#include "tests/support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::Hybrid;
using zamba_test::read_text;
using zamba_test::small;
using zamba_test::TemporaryFolder;
using zamba_test::Text;
using zamba_test::two_phases;

std::vector<nlohmann::json> records(const std::filesystem::path& log) {
  std::vector<nlohmann::json> all;
  std::istringstream lines(read_text(log));
  for (std::string line; std::getline(lines, line);) {
    all.push_back(nlohmann::json::parse(line));
    all.back().erase("time");
  }
  return all;
}

}  // namespace

TEST_SUITE("train/trainer") {
  TEST_CASE("the first step is that of the mean loss over all targets of all micro-batches") {
    const Text text(4000);
    const TemporaryFolder folder;
    const auto phases = two_phases(text, 10 * 96);
    auto model = zamba_test::random_model<Hybrid, double>();
    const auto initial = zamba_test::random_model<Hybrid, double>();
    auto options = small(folder.path);
    options.seed = {10};
    options.z_loss = 0.01;
    Trainer trainer(model, phases, options);
    CHECK(trainer.tokens_per_step() == 96);
    CHECK(trainer.steps() == 15);
    trainer.take_step();

    // Both micro-batches as one batch: their numbers of targets differ, because document ends have none.
    PackedBatch first, second;
    const Mixture mixture(phases[0].mixture);
    mixture.draw(Seed{10}, 0, 0, 2, 24, first);
    mixture.draw(Seed{10}, 0, 1, 2, 24, second);
    const auto targets = [](const PackedBatch& b) {
      return std::count_if(b.targets.begin(), b.targets.end(), [](Token t) { return t >= 0; });
    };
    CHECK(targets(first) != targets(second));
    for (const Index offset : second.offsets)
      if (offset > 0) first.offsets.push_back(48 + offset);
    first.tokens.insert(first.tokens.end(), second.tokens.begin(), second.tokens.end());
    first.targets.insert(first.targets.end(), second.targets.begin(), second.targets.end());
    auto gradients = initial.new_gradients();
    const TrainingBatch both{first.tokens, first.targets, first.offsets};
    const LossSum loss = initial.loss_and_gradients(this_thread_context<cpu>(), both, gradients, {.z_loss = 0.01});
    CHECK(loss.mean() > 1.01 * initial.loss(both).mean());  // logarithms of normalisers are about 3
    const auto record = records(folder.path / "log.jsonl").at(0);
    // Sums in another order: float64 rounding over some thousand terms.
    CHECK(record.at("loss").get<double>() == doctest::Approx(loss.mean()).epsilon(1e-12));
    CHECK(record.at("gradient_norm").get<double>() == doctest::Approx(global_norm(gradients)).epsilon(1e-12));
    CHECK(record.at("learning_rate") == 0);  // the first of a warm-up
    CHECK(record.at("tokens") == 96);
  }

  TEST_CASE("two phases: the log, the measurements, the checkpoints, the picture") {
    const Text text(4000);
    const TemporaryFolder folder;
    Model<Hybrid, float> model(Seed{3});
    TrainerOptions options = small(folder.path);
    options.held_out = text.parts.held_out;
    options.evaluate_every_steps = 50;
    const auto phases = two_phases(text, 100 * 96);
    Trainer trainer(model, phases, options);
    trainer.run_phase();
    CHECK(trainer.step() == 100);
    CHECK(!trainer.finished());
    trainer.run();
    CHECK(trainer.finished());
    CHECK(trainer.tokens() == 150 * 96);
    CHECK_THROWS_WITH(trainer.take_step(), "zamba: Trainer: all 150 steps were taken");

    std::vector<double> losses, rates, held_out;
    for (const auto& record : records(folder.path / "log.jsonl")) {
      if (record.contains("held_out_bits_per_byte")) {
        CHECK(record.at("step") == 50 * held_out.size());
        held_out.push_back(record.at("held_out_bits_per_byte"));
        continue;
      }
      losses.push_back(record.at("loss"));
      rates.push_back(record.at("learning_rate"));
      CHECK(record.at("step") == losses.size());
      CHECK(record.at("phase") == (losses.size() <= 100 ? "pretraining" : "annealing"));
    }
    REQUIRE(losses.size() == 150);
    REQUIRE(held_out.size() == 4);
    CHECK(rates[10] == 4e-3);
    CHECK(rates[100] == 2e-3);
    CHECK(rates[105] == 3e-3);
    // Untrained, 29 tokens cost log2(29) = 4.86 bits; counting on from one token to the next is soon learnt.
    CHECK(held_out[0] == doctest::Approx(4.86).epsilon(0.02));
    CHECK(held_out[3] < 0.6 * held_out[0]);
    CHECK(held_out[3] == trainer.held_out_bits_per_byte());
    CHECK(losses.back() == trainer.loss());
    CHECK(read_text(folder.path / "loss.svg").find(">annealing<") != std::string::npos);

    // Each phase's end is kept; the newest checkpoint is the last of them.
    CHECK(read_text(folder.path / "phase-2.safetensors") == read_text(folder.path / "checkpoint.safetensors"));
    Model<Hybrid, float> loaded(Seed{4});
    load_weights(folder.path / "checkpoint.safetensors", loaded);
    for (const ParameterEntry& entry : model.entries()) CHECK(loaded.read(entry) == model.read(entry));

    // The second phase alone, from the first one's end: the same first loss but for the batch, which is of step 0.
    const TemporaryFolder other;
    options.folder = other.path;
    options.start_from = folder.path / "phase-1.safetensors";
    Model<Hybrid, float> second(Seed{5});
    Trainer annealing(second, {phases[1]}, options);
    CHECK(annealing.held_out_bits_per_byte() == held_out[2]);
    annealing.run();
    CHECK(annealing.step() == 50);
    CHECK(annealing.held_out_bits_per_byte() < held_out[2]);
  }

  TEST_CASE("recomputing gives the same weights, bit by bit") {
    const Text text(4000);
    std::vector<std::vector<double>> weights;
    for (const Keep keep : {Keep::everything, Keep::costly, Keep::layer_inputs}) {
      auto model = zamba_test::random_model<Hybrid, float>();
      TrainerOptions options = small();
      options.keep = keep;
      Trainer(model, two_phases(text, 4 * 96), options).run();
      weights.push_back(zamba_test::weights_of(model));
    }
    CHECK(weights[1] == weights[0]);
    CHECK(weights[2] == weights[0]);
  }

  TEST_CASE("steps allocate nothing after the first") {
    const Text text(4000);  // documents of all lengths, so no two batches are cut alike
    for (const Keep keep : {Keep::everything, Keep::layer_inputs}) {
      auto model = zamba_test::random_model<Hybrid, bf16>();
      TrainerOptions options = small();
      options.keep = keep;
      options.adamw.groups = {{.match = "shared.*", .rate = 0.5}, {.match = "layers.1.*", .frozen = true}};
      Index told = 0;
      options.on_step = [&](const StepReport& report) { told = report.step; };
      Context<cpu> ctx(2);
      const long before = zamba_test::allocations;
      Trainer trainer(ctx, model, two_phases(text, 20 * 96), options);
      trainer.take_step();
      const long after_first = zamba_test::allocations;
      CHECK(after_first > before);
      trainer.run();
      CHECK(zamba_test::allocations == after_first);
      CHECK(told == 30);
    }
  }

  TEST_CASE("bfloat16 weights with float32 masters") {
    const Text text(4000);
    const TemporaryFolder folder;
    Model<Hybrid, bf16> model(Seed{3});
    Trainer trainer(model, two_phases(text, 100 * 96), small(folder.path));
    trainer.take_step();
    const double before = trainer.loss();
    trainer.run();
    CHECK(trainer.loss() < 0.6 * before);
    Index differing = 0;
    for (const ParameterEntry& entry : model.entries()) {
      if (entry.precise) continue;
      const auto* weights = reinterpret_cast<const bf16*>(std::as_const(model).data(entry));
      const auto masters = zamba_test::masters_of(model, trainer.optimiser(), entry);
      for (Index i = 0; i < entry.size; ++i) {
        const float exact = static_cast<float>(masters[static_cast<std::size_t>(i)]), stored = weights[i];
        differing += exact != stored;
        REQUIRE(stored == static_cast<float>(SplitFloat(exact).nearest));
        REQUIRE(std::abs(exact - stored) <= std::abs(exact) * 0x1p-8f);  // half a unit in the last of 8 bits
      }
    }
    CHECK(differing > 1000);  // the masters do hold more

    // Into a float model go the masters, into a bf16 model their roundings; a run begins with them whole.
    Model<Hybrid, float> wide(Seed{4});
    load_weights(folder.path / "checkpoint.safetensors", wide);
    for (const ParameterEntry& entry : wide.entries()) {
      if (entry.precise) continue;
      const ParameterEntry& there = model.entries()[static_cast<std::size_t>(&entry - wide.entries().data())];
      REQUIRE(wide.read(entry) == zamba_test::masters_of(model, trainer.optimiser(), there));
    }
    TrainerOptions options = small();
    options.start_from = folder.path / "checkpoint.safetensors";
    Model<Hybrid, bf16> narrow(Seed{4});
    const Trainer from_there(narrow, two_phases(text, 96), options);
    for (const ParameterEntry& entry : narrow.entries()) {
      if (entry.precise) continue;
      REQUIRE(zamba_test::masters_of(narrow, from_there.optimiser(), entry) ==
              zamba_test::masters_of(model, trainer.optimiser(), entry));
    }
  }

  TEST_CASE("a run is continued with the same arithmetic only, and the difference is named") {
    const Text text(4000);
    const TemporaryFolder folder;
    const auto phases = two_phases(text, 2 * 96);
    const TrainerOptions options = small(folder.path);
    {
      Model<Hybrid, float> model(Seed{3});
      Trainer(model, phases, options).run_phase();
    }
    const auto refusal = [&](const std::vector<Phase>& other_phases, const TrainerOptions& other) -> std::string {
      Model<Hybrid, float> model(Seed{3});
      try {
        Trainer(model, other_phases, other);
      } catch (const Error& error) {
        return error.what();
      }
      return "continued";
    };
    const auto names = [&](const std::string& message, const char* part) {
      INFO(message);
      CHECK(message.find(part) != std::string::npos);
    };
    CHECK(refusal(phases, options) == "continued");
    auto changed = options;
    changed.rows = 3;
    changed.adamw.beta2 = 0.99;
    changed.z_loss = 0.001;
    names(refusal(phases, changed), "rows: '2' in the checkpoint, '3' now");
    names(refusal(phases, changed), "adamw.beta2: '0.95' in the checkpoint, '0.99' now");
    names(refusal(phases, changed), "z_loss: '0.0' in the checkpoint, '0.001' now");
    auto other = phases;
    other[0].rate = LearningRate::constant(1e-3);
    names(refusal(other, options), "phase 1.rate: 'linear 0 to 0.004 over 0.1 of the phase, cosine 0.004 to 0.002'");
    names(refusal(other, options), "start_from: that takes the weights alone, and begins with new moments");
    other = phases;
    other[0].mixture[0].weight = 2;
    names(refusal(other, options), "phase 1.mixture: ");
    const Text other_text(4100);
    names(refusal(two_phases(other_text, 2 * 96), options), "phase 1.text of text: ");
    // What did not begin yet may change; what is only written does not matter.
    other = phases;
    other[1].tokens *= 3;
    changed = options;
    changed.log_every_steps = 5;
    changed.keep = Keep::layer_inputs;
    CHECK(refusal(other, changed) == "continued");
    CHECK(refusal({phases[0]}, options) == "continued");

    Model<zamba_test::TwoCopies, float> of_other_layers(Seed{3});
    try {
      Trainer(of_other_layers, phases, options);
      FAIL("another architecture was taken");
    } catch (const Error& error) {
      names(error.what(), "the checkpoint is of an architecture of hash");
    }
    Model<Hybrid, bf16> of_other_storage(Seed{3});
    try {
      Trainer(of_other_storage, phases, options);
      FAIL("another storage type was taken");
    } catch (const Error& error) {
      names(error.what(), "storage: 'F32' in the checkpoint, 'BF16' now");
    }
  }

  TEST_CASE("a checkpoint that does not fit is refused with a list, and nothing is changed") {
    const TemporaryFolder folder;
    const auto path = folder.path / "checkpoint.safetensors";
    auto model = zamba_test::random_model<Hybrid, float>();
    const AdamW<Hybrid, float, cpu> optimiser(model);
    save_checkpoint(path, model, optimiser);
    const Safetensors whole = Safetensors::open(path);
    std::vector<TensorSource> tensors;
    for (const TensorEntry& tensor : whole.tensors()) {
      if (tensor.name == "weights.embedding.weight") continue;
      tensors.push_back({tensor.name, tensor.dtype, tensor.shape, [&tensor] { return tensor.bytes; }});
      if (tensor.name == "weights.final_norm.weight") tensors.back().shape = {1, 16};
    }
    tensors.push_back({"weights.extra", DType::F32, {0}, [] { return std::span<const std::byte>(); }});
    write_safetensors(folder.path / "damaged", tensors, whole.metadata());
    Model<Hybrid, float> other(Seed{8});
    AdamW<Hybrid, float, cpu> others(other);
    const auto before = other.read(other.entries()[0]);
    CHECK_THROWS_WITH(load_checkpoint(Safetensors::open(folder.path / "damaged"), other, others),
                      ("zamba: " + (folder.path / "damaged").string() +
                       " does not fit this run:\n  weights.embedding.weight: missing\n  weights.final_norm.weight: "
                       "wanted F32 (16), came F32 (1, 16)\n  'weights.extra': surplus")
                          .c_str());
    CHECK(other.read(other.entries()[0]) == before);
    CHECK_THROWS_AS(load_weights(folder.path / "damaged", other), Error);
    CHECK(other.read(other.entries()[0]) == before);
  }

  TEST_CASE("a disk that is full while saving: an error, and the checkpoint before it stays") {
    const Text text(4000);
    const TemporaryFolder folder;
    TrainerOptions options = small(folder.path);
    options.checkpoint_every_steps = 2;
    options.log_every_steps = 0;
    const auto phases = two_phases(text, 20 * 96);
    Model<Hybrid, float> model(Seed{3});
    {
      Trainer trainer(model, phases, options);
      for (int i = 0; i < 3; ++i) trainer.take_step();
      const std::string before = read_text(folder.path / "checkpoint.safetensors");
      // A limit on the size of files acts as a full disk does: writing stops in the middle.
      struct rlimit old {};
      REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
      struct rlimit limit = old;
      limit.rlim_cur = before.size() / 2;
      const auto handler = std::signal(SIGXFSZ, SIG_IGN);
      REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
      std::string message;
      try {
        trainer.run();
      } catch (const Error& error) {
        message = error.what();
      }
      REQUIRE(::setrlimit(RLIMIT_FSIZE, &old) == 0);
      std::signal(SIGXFSZ, handler);
      CHECK(message.starts_with("zamba: cannot write '" + (folder.path / "checkpoint.safetensors").string() + "': "));
      CHECK(trainer.step() == 4);
      CHECK(read_text(folder.path / "checkpoint.safetensors") == before);
    }
    for (const auto& file : std::filesystem::directory_iterator(folder.path))
      CHECK(file.path().string().find(".tmp-") == std::string::npos);
    Trainer again(model, phases, options);
    CHECK(again.step() == 2);
  }

  TEST_CASE("a loss that is not finite ends the run before the weights are touched") {
    const Text text(4000);
    auto model = zamba_test::random_model<Hybrid, float>();
    const ParameterEntry& norm = model.entries().back();
    model.write(norm, std::vector<double>(static_cast<std::size_t>(norm.size), std::nan("")));
    const auto before = model.read(model.entries()[0]);
    Trainer trainer(model, two_phases(text, 960), small());
    CHECK_THROWS_WITH(trainer.take_step(),
                      "zamba: Trainer: step 1, in phase 'pretraining', was not taken: the loss is nan; the model is as "
                      "it was after step 0");
    CHECK(trainer.step() == 0);
    CHECK(model.read(model.entries()[0]) == before);
  }

  TEST_CASE("nonsense is refused") {
    const Text text(4000);
    const TemporaryFolder folder;
    Model<Hybrid, float> model(Seed{3});
    const auto phases = two_phases(text, 960);
    CHECK_THROWS_WITH(Trainer(model, {}, small()), "zamba: Trainer: there is no phase");
    auto none = phases;
    none[1].tokens = 0;
    CHECK_THROWS_WITH(Trainer(model, none, small()),
                      "zamba: Trainer: phase 'annealing' must have a positive number of tokens, got 0");
    auto options = small();
    options.accumulation = 0;
    CHECK_THROWS_AS(Trainer(model, phases, options), Error);
    options = small();
    options.length = 5000;
    CHECK_THROWS_AS(Trainer(model, phases, options), Error);
    options = small();
    options.start_from = folder.path / "none.safetensors";
    CHECK_THROWS_AS(Trainer(model, phases, options), Error);
    zamba_test::write_text(folder.path / "file", "");
    CHECK_THROWS_AS(Trainer(model, phases, small(folder.path / "file")), Error);

    Trainer first(model, phases, small(folder.path));
    Model<Hybrid, float> other(Seed{3});
    CHECK_THROWS_WITH(Trainer(other, phases, small(folder.path)),
                      ("zamba: Trainer: the folder '" + folder.path.string() + "' is in use by another run").c_str());
  }
}
