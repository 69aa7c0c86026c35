// SPDX-License-Identifier: MIT
// The Trainer on CUDA, in bf16: a run as a whole, and what passes between the devices by a checkpoint.
#include <zamba/zamba.cuh>

#include <cmath>

#include <doctest/doctest.h>

#include <zamba/train/trainer.hpp>

#include "../support/nets.hpp"
#include "../support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::entry_of;
using zamba_test::error_of;
using zamba_test::has;
using zamba_test::log_without_times;
using zamba_test::read_text;
using zamba_test::small;
using zamba_test::TemporaryFolder;
using zamba_test::Text;
using zamba_test::two_phases;
using zamba_test::vocabulary;
using zamba_test::weights_of;

/// m h, with a head of its own: a token that embeds as NaN does no harm until it is read.
using Net = LanguageModel<vocabulary,
                          HybridStack<2, 2, MambaBlock<MambaConfig{.d_model = 64, .d_state = 16, .n_heads = 2}>,
                                      SharedAttention<SharedAttentionConfig{.d_model = 64, .n_heads = 2, .d_ff = 96}>>,
                          Head::own>;
template <class Device>
using ModelOn = Model<Net, bf16, Device>;
template <class Device>
using Run = Trainer<Net, bf16, Device>;

constexpr Index steps = 20;  // of the first phase; the second has half as many

std::vector<Phase> phases(const Text& text) { return two_phases(text, steps * 96); }

void check_same_run(const std::filesystem::path& one, const std::filesystem::path& other) {
  for (const char* name : {"checkpoint.safetensors", "phase-1.safetensors", "phase-2.safetensors", "loss.svg"}) {
    CAPTURE(name);
    CHECK((read_text(one / name) == read_text(other / name)));
  }
  CHECK(log_without_times(one / "log.jsonl") == log_without_times(other / "log.jsonl"));
}

/// A whole run, and the losses of its steps.
std::vector<double> run_whole(const Text& text, TrainerOptions options, Seed seed = {3}) {
  std::vector<double> losses;
  options.on_step = [&](const StepReport& report) { losses.push_back(report.loss); };
  ModelOn<cuda> model(seed);
  Context<cuda> ctx;
  Run<cuda>(ctx, model, phases(text), options).run();
  return losses;
}

TrainerOptions measured(const Text& text, const std::filesystem::path& folder) {
  TrainerOptions options = small(folder);
  options.held_out = text.parts.held_out;
  options.evaluate_every_steps = 7;
  options.checkpoint_every_steps = 4;
  return options;
}

}  // namespace

TEST_SUITE("cuda/trainer") {
  TEST_CASE("a run lowers the loss, and a rerun is the same, bit by bit") {
    const Text text(4000);
    const TemporaryFolder folder, other;
    const std::vector<double> losses = run_whole(text, measured(text, folder.path));
    REQUIRE(losses.size() == steps + steps / 2);
    CHECK(losses[steps - 1] < 0.3 * losses.front());
    CHECK(losses.back() < 0.3 * losses.front());
    CHECK(run_whole(text, measured(text, other.path)) == losses);
    check_same_run(folder.path, other.path);
  }

  TEST_CASE("stopped again and again and made again, a run ends bit-equal") {
    const Text text(4000);
    const TemporaryFolder whole, stopped;
    const std::vector<double> losses = run_whole(text, measured(text, whole.path));
    TrainerOptions options = measured(text, stopped.path);
    std::vector<double> seen;
    Run<cuda>* running = nullptr;
    options.on_step = [&](const StepReport& report) {
      seen.push_back(report.loss);
      if (report.step % 6 == 5 || report.step == steps) running->stop();
    };
    for (const Index step : {5, 11, 17, 20, 23, 29, 30}) {
      ModelOn<cuda> model(Seed{4});
      if (step == 5) model = ModelOn<cuda>(Seed{3});
      Run<cuda> run(model, phases(text), options);
      running = &run;
      run.run();
      CHECK(run.step() == step);
      CHECK(run.stopped() == (step < 30));
    }
    CHECK(seen == losses);
    check_same_run(whole.path, stopped.path);
  }

  TEST_CASE("a step adds up its micro-batches, and is that of the model and of AdamW") {
    const Text text(4000);
    TrainerOptions options = small();
    options.accumulation = 3;
    options.z_loss = 1e-3;
    ModelOn<cuda> trained(Seed{3}), model(Seed{3});
    Run<cuda> run(trained, phases(text), options);
    auto gradients = model.new_gradients();
    AdamW optimiser(model);
    PackedBatch batches[3];
    const Mixture mixture(phases(text)[0].mixture);
    for (Index step = 0; step < 3; ++step) {
      run.take_step();
      Index targets = 0;
      for (Index i = 0; i < 3; ++i) {
        mixture.draw(options.seed, step, i, options.rows, options.length, batches[i]);
        targets += std::count_if(batches[i].targets.begin(), batches[i].targets.end(), [](Token t) { return t >= 0; });
      }
      const double scale = 1 / static_cast<double>(targets);
      gradients.zero();
      double sum = 0;
      for (const PackedBatch& batch : batches)
        sum += model
                   .loss_and_gradients(this_thread_context<cuda>(), {batch.tokens, batch.targets, batch.offsets},
                                       gradients, {.scale = scale, .z_loss = options.z_loss})
                   .sum;
      optimiser.step(model, gradients, phases(text)[0].rate.at(step * run.tokens_per_step(), phases(text)[0].tokens));
      CHECK(run.loss() == sum * scale);
      CHECK(run.optimiser().gradient_norm() == optimiser.gradient_norm());
    }
    CHECK(weights_of(trained) == weights_of(model));
  }

  TEST_CASE("a step that is not finite ends the run with the model as it was") {
    const Text text(4000);
    TrainerOptions options = small();
    // The token that first comes last.
    Index bad_step = 0;
    Token bad_token = 0;
    PackedBatch batch;
    std::vector<Index> first(static_cast<std::size_t>(vocabulary), -1);
    const Mixture mixture(phases(text)[0].mixture);
    for (Index step = 0; step < steps; ++step)
      for (Index i = 0; i < options.accumulation; ++i) {
        mixture.draw(options.seed, step, i, options.rows, options.length, batch);
        for (const Token token : batch.tokens) {
          Index& at = first[static_cast<std::size_t>(token)];
          if (at >= 0) continue;
          at = bad_step = step;
          bad_token = token;
        }
      }
    REQUIRE(bad_step > 0);
    const auto poisoned = [&] {
      ModelOn<cuda> model(Seed{3});
      const ParameterEntry& table = entry_of(model, "embedding.weight");
      auto values = model.read(table);
      std::fill_n(values.begin() + bad_token * table.shape[1], table.shape[1], std::nan(""));
      model.write(table, values);
      return model;
    };
    const auto bits = [](const ModelOn<cuda>& model) {
      std::vector<std::byte> all;
      for (const ParameterEntry& entry : model.entries()) {
        const std::size_t begin = all.size();
        all.resize(begin + model.bytes(entry));
        Memory<cuda>::copy_to_host(all.data() + begin, model.data(entry), model.bytes(entry));
      }
      return all;
    };
    ModelOn<cuda> model = poisoned(), wanted = poisoned();
    Run<cuda> run(model, phases(text), options), until(wanted, phases(text), options);
    for (Index step = 0; step < bad_step; ++step) until.take_step();
    const std::string message = error_of([&] { run.run(); });
    INFO(message);
    CHECK(message ==
          "zamba: Trainer: step " + std::to_string(bad_step + 1) +
              ", in phase 'pretraining', was not taken: the loss is nan; the model is as it was after step " +
              std::to_string(bad_step));
    CHECK(run.step() == bad_step);
    CHECK(run.loss() == until.loss());
    CHECK(run.optimiser().steps() == bad_step);
    CHECK(bits(model) == bits(wanted));
    CHECK(error_of([&] { run.run(); }) == message);
    CHECK(bits(model) == bits(wanted));
  }

  TEST_CASE("gradients that are not finite are named, though those of the next step are there already") {
    const Text text(4000);
    ModelOn<cuda> model(Seed{3});
    const ParameterEntry& rates = entry_of(model, "layers.0.A_log");
    auto values = model.read(rates);
    values[0] = 100;  // a decay rate of e^100, infinite in float: the loss stays finite
    model.write(rates, values);
    const auto before = weights_of(model);
    Run<cuda> run(model, phases(text), small());
    const std::string message = error_of([&] { run.run(); });
    INFO(message);
    CHECK(has(message,
              "step 1, in phase 'pretraining', was not taken: AdamW: the norm of the gradients is nan: element"));
    CHECK(error_of([&] { run.take_step(); }) == message);
    CHECK(weights_of(model) == before);
    CHECK(run.optimiser().steps() == 0);
  }

  TEST_CASE("what is frozen stays as it is, and the rest trains") {
    const Text text(4000);
    TrainerOptions options = small();
    options.adamw.groups = {{.match = "shared.*", .rate = 0.5}, {.match = "layers.*", .frozen = true}};
    ModelOn<cuda> model(Seed{3});
    const ModelOn<cuda> before(Seed{3});
    Run<cuda> run(model, phases(text), options);
    run.take_step();
    const double loss = run.loss();
    run.run();
    CHECK(run.loss() < loss);
    for (const ParameterEntry& entry : model.entries()) {
      CAPTURE(entry.name);
      CHECK((model.read(entry) == before.read(entry)) == entry.name.starts_with("layers."));
    }
  }

  TEST_CASE("what is computed again is the same, bit by bit") {
    const Text text(4000);
    TrainerOptions options = small();
    const std::vector<double> losses = run_whole(text, options);
    for (const Keep keep : {Keep::costly, Keep::layer_inputs}) {
      options.keep = keep;
      CHECK(run_whole(text, options) == losses);
    }
  }

  TEST_CASE("steps take no memory after the first") {
    const Text text(4000);
    ModelOn<cuda> model(Seed{3});
    Context<cuda> ctx;
    Run<cuda> run(ctx, model, phases(text), small());
    run.take_step();
    const std::size_t generation = ctx.arena().generation(), free = Memory<cuda>::free_bytes();
    run.run();
    CHECK(ctx.arena().generation() == generation);
    CHECK(Memory<cuda>::free_bytes() == free);
  }

  TEST_CASE("a checkpoint of one device begins a run on the other, and continues none") {
    const Text text(4000);
    const TemporaryFolder of_cpu, of_cuda;
    TrainerOptions options = small(of_cpu.path);
    ModelOn<cpu> model(Seed{3});
    {
      Run<cpu> run(model, phases(text), options);
      run.take_step();
      run.stop();
      run.run();
    }
    const auto refusal = [&](auto device) {
      ModelOn<decltype(device)> other(Seed{4});
      const auto before = weights_of(other);
      const std::string message = error_of([&] { Run<decltype(device)>(other, phases(text), options); });
      CHECK(weights_of(other) == before);
      INFO(message);
      CHECK(has(message, "was made with other options, and would not be continued exactly:"));
      return message;
    };
    CHECK(has(refusal(cuda{}), "\n  device: 'cpu' in the checkpoint, 'cuda "));

    // The same weights and masters, and from there losses that differ by rounding only.
    options.folder = of_cuda.path;
    options.start_from = of_cpu.path / "checkpoint.safetensors";
    ModelOn<cuda> there(Seed{4});
    ModelOn<cpu> here(Seed{5});
    TrainerOptions of_here = options;
    of_here.folder.clear();
    {
      Run<cuda> run(there, phases(text), options);
      Run<cpu> beside(here, phases(text), of_here);
      CHECK(weights_of(there) == weights_of(model));
      CHECK(weights_of(here) == weights_of(model));
      for (int i = 0; i < 3; ++i) {
        run.take_step();
        beside.take_step();
        CHECK(run.loss() == doctest::Approx(beside.loss()).epsilon(0x1p-7));  // activations of 8 bits on CUDA
      }
      run.stop();
      run.run();
    }
    options.start_from.clear();
    CHECK(has(refusal(cpu{}), "\n  device: 'cuda "));
    of_here.start_from = of_cuda.path / "checkpoint.safetensors";
    const Run<cpu> back(here, phases(text), of_here);
    CHECK(weights_of(here) == weights_of(there));
  }

  TEST_CASE("held-out text is measured as the CPU measures it, and the trained model goes on with what it learnt") {
    const Text text(4000);
    const TemporaryFolder folder;
    TrainerOptions options = measured(text, folder.path);
    ModelOn<cuda> model(Seed{3});
    Run<cuda> run(model, two_phases(text, 150 * 96), options);
    const double untrained = run.held_out_bits_per_byte();
    run.run();
    const double trained = run.held_out_bits_per_byte();
    CHECK(trained < 0.2 * untrained);
    PackedBatch batch;
    const auto on_cpu = model.to<bf16, cpu>();
    const LossSum loss =
        held_out_loss(this_thread_context<cpu>(), on_cpu, text.parts.held_out, options.length, options.rows, batch);
    CHECK(trained == doctest::Approx(bits_per_byte(loss)).epsilon(0x1p-6));

    // Documents count on from one token to the next.
    const std::vector<std::vector<Token>> prompts{{3, 4, 5, 6, 7}, {10, 11, 12, 13, 14, 15}};
    const GenerationOptions greedy{.sampling = {.temperature = 0}, .max_new_tokens = 5, .excluded_tokens = {0}};
    auto state = model.new_state({.batch = 2, .max_length = 16});
    const auto rows = generate(model, state, prompts, greedy);
    Index right = 0;
    for (std::size_t row = 0; row < rows.size(); ++row)
      for (std::size_t i = 0; i < rows[row].size(); ++i)
        right += rows[row][i] == prompts[row].back() + 1 + static_cast<Token>(i);
    CHECK(right >= 8);  // of 10
  }
}
