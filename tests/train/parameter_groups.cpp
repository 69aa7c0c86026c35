// SPDX-License-Identifier: MIT
// Parameters that are frozen or have a rate of their own: what a step does to them, and what a run is continued with.
#include <zamba/train/parameter_groups.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/train/trainer.hpp>

#include "tests/support/nets.hpp"
#include "tests/support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::error_of;
using zamba_test::has;
using zamba_test::Hybrid;
using zamba_test::small;
using zamba_test::TemporaryFolder;
using zamba_test::Text;
using zamba_test::two_phases;
using zamba_test::TwoAdapted;

bool begins(const ParameterEntry& entry, const char* prefix) { return entry.name.starts_with(prefix); }
bool is_adapter(const ParameterEntry& entry) { return has(entry.name, "adapter"); }

/// A model with AdamW, after a step that its groups do not see: moments are not zero.
template <class T>
struct Stepped {
  explicit Stepped(AdamWOptions options = {}) : optimiser(model, options) {
    AdamW<Hybrid, T, cpu> before(model, {.clip_norm = 0});
    before.step(model, gradients(3), 1e-2);
    const auto take = [](auto from, auto to) { std::copy_n(from.data, from.size(), to.data); };
    take(before.first_moments(), optimiser.first_moments());
    take(before.second_moments(), optimiser.second_moments());
    take(before.lower_halves(), optimiser.lower_halves());
    optimiser.set_steps(before.steps());
  }

  /// Small integers, so that sums of squares are exact in any order.
  Gradients<Hybrid, T, cpu> gradients(Index first) const {
    auto result = model.new_gradients();
    for (const ParameterEntry& entry : model.entries())
      for (Index i = 0; i < entry.size; ++i)
        result.values()[entry.offset + i] = static_cast<compute_t<T>>((first + 7 * i) % 11 - 5);
    return result;
  }
  void step(const Gradients<Hybrid, T, cpu>& with, double rate) { optimiser.step(model, with, rate); }

  /// The parameter with its moments and its masters.
  std::vector<double> all_of(const ParameterEntry& entry) const {
    std::vector<double> all = model.read(entry);
    for (const auto& part : {optimiser.first_moments(), optimiser.second_moments()})
      for (Index i = 0; i < entry.size; ++i) all.push_back(part[entry.offset + i]);
    for (const double value : zamba_test::masters_of(model, optimiser, entry)) all.push_back(value);
    return all;
  }

  Model<Hybrid, T> model = zamba_test::random_model<Hybrid, T>();
  AdamW<Hybrid, T, cpu> optimiser;
};

/// Frozen: weights, moments and masters keep their bits; all others step as beside gradients of zero.
template <class T>
void frozen_parameters_stay(double clip_norm) {
  CAPTURE(clip_norm);
  const auto frozen = [](const ParameterEntry& entry) {
    return begins(entry, "shared.") || begins(entry, "layers.2.");
  };
  Stepped<T> grouped({.clip_norm = clip_norm, .groups = {{.match = frozen, .frozen = true}}});
  Stepped<T> plain({.clip_norm = clip_norm});
  const Stepped<T> before;
  auto gradients = grouped.gradients(1);
  grouped.step(gradients, 1e-2);
  double squared = 0;
  for (const ParameterEntry& entry : grouped.model.entries())
    for (Index i = 0; i < entry.size; ++i) {
      auto& value = gradients.values()[entry.offset + i];
      if (frozen(entry)) value = 0;
      squared += static_cast<double>(value) * static_cast<double>(value);
    }
  plain.step(gradients, 1e-2);
  CHECK(grouped.optimiser.gradient_norm() == std::sqrt(squared));
  CHECK(grouped.optimiser.steps() == 2);
  Index stayed = 0, moved = 0;
  for (const ParameterEntry& entry : grouped.model.entries()) {
    CAPTURE(entry.name);
    const auto now = grouped.all_of(entry);
    REQUIRE(now == (frozen(entry) ? before : plain).all_of(entry));
    REQUIRE(now != (frozen(entry) ? plain : before).all_of(entry));
    ++(frozen(entry) ? stayed : moved);
  }
  CHECK(stayed >= 10);
  CHECK(moved >= 10);
}

/// The bytes of a run's weights.
template <class Net = Hybrid>
std::vector<double> trained_with(const Text& text, double peak, const AdamWOptions& adamw) {
  auto model = zamba_test::random_model<Net, float>();
  auto phases = two_phases(text, 6 * 96);
  phases[0].rate = LearningRate::warm_up(peak, {.fraction = 0.3}).then(LearningRate::cosine(peak, peak / 2));
  phases[1].rate = LearningRate::exponential(peak / 2, peak / 64);
  auto options = small();
  options.adamw = adamw;
  Trainer(model, phases, options).run();
  return zamba_test::weights_of(model);
}

}  // namespace

TEST_SUITE("train/parameter_groups") {
  TEST_CASE("a pattern is of a whole name, and its stars of any part") {
    const auto matches = detail::matches_pattern;
    CHECK(matches("shared.0.q_proj.weight", "shared.0.q_proj.weight"));
    CHECK(matches("shared.0.q_proj.weight", "shared.*"));
    CHECK(matches("shared.0.q_proj.weight", "*weight"));
    CHECK(matches("shared.0.q_proj.weight", "*.q_proj.*"));
    CHECK(matches("shared.0.q_proj.weight", "*"));
    CHECK(matches("shared.0.q_proj.weight", "**s*0**weight**"));
    CHECK(matches("aab", "*ab"));
    CHECK(matches("abab", "a*ab"));
    CHECK(matches("", ""));
    CHECK(matches("", "*"));
    CHECK(!matches("shared.0.q_proj.weight", "shared"));
    CHECK(!matches("shared.0.q_proj.weight", "q_proj"));
    CHECK(!matches("shared.0.q_proj.weight", "*q_proj"));
    CHECK(!matches("shared.0.q_proj.weight", "shared.*.bias"));
    CHECK(!matches("shared.0.q_proj.weight", ""));
    CHECK(!matches("", "a"));
    CHECK(!matches("ab", "a*ab"));
    CHECK(!matches("abc", "abcd*"));
  }

  TEST_CASE("frozen parameters keep their bits, and the others step as if those had no gradients") {
    for (const double clip_norm : {0., 1.}) {
      frozen_parameters_stay<float>(clip_norm);
      frozen_parameters_stay<double>(clip_norm);
      frozen_parameters_stay<bf16>(clip_norm);
    }
  }

  TEST_CASE("gradients of frozen parameters may be anything, those of others may not") {
    Stepped<float> grouped({.groups = {{.match = "shared.*", .frozen = true}}});
    auto gradients = grouped.gradients(1);
    Index of_frozen = 0, of_other = 0;
    for (const ParameterEntry& entry : grouped.model.entries())
      (begins(entry, "shared.") ? of_frozen : of_other) = entry.offset;
    gradients.values()[of_frozen] = std::numeric_limits<float>::quiet_NaN();
    CHECK_NOTHROW(grouped.step(gradients, 1e-2));
    CHECK(std::isfinite(grouped.optimiser.gradient_norm()));
    gradients.values()[of_other] = std::numeric_limits<float>::infinity();
    const auto before = zamba_test::weights_of(grouped.model);
    const std::string message = error_of([&] { grouped.step(gradients, 1e-2); });
    CHECK(has(message, "the norm of the gradients is inf: element 0 of that of 'final_norm.weight' is inf"));
    CHECK(zamba_test::weights_of(grouped.model) == before);
  }

  TEST_CASE("a group steps at its multiple of the rate, the others at the rate, and the first group counts") {
    Stepped<bf16> grouped(
        {.groups = {{.match = "shared.*", .rate = 0.5},
                    {.match = "*norm.weight", .frozen = true},
                    {.match = [](const ParameterEntry& e) { return begins(e, "layers.0."); }, .rate = 4},
                    {.match = "layers.*"}}});
    const auto multiple = [](const ParameterEntry& e) {
      return begins(e, "shared.") ? 0.5 : e.name.ends_with("norm.weight") ? 0 : begins(e, "layers.0.") ? 4 : 1;
    };
    // Clipped or not, the norm is that of what is not frozen: that of a run with them frozen and no other group.
    const auto gradients = grouped.gradients(1);
    grouped.step(gradients, 1e-2);
    for (const double rate : {0.5, 0., 4., 1.}) {
      CAPTURE(rate);
      Stepped<bf16> plain({.groups = {{.match = "shared.*"}, {.match = "*norm.weight", .frozen = true}}});
      if (rate > 0) plain.step(gradients, 1e-2 * rate);
      Index count = 0;
      for (const ParameterEntry& entry : grouped.model.entries())
        if (multiple(entry) == rate) {
          CAPTURE(entry.name);
          REQUIRE(grouped.all_of(entry) == plain.all_of(entry));
          ++count;
        }
      CHECK(count >= 3);
    }
  }

  TEST_CASE("half a group's rate is half the schedule, bit by bit, through a whole run") {
    const Text text(4000);
    const auto half = trained_with(text, 2e-3, {});
    CHECK(trained_with(text, 4e-3, {.groups = {{.match = "*", .rate = 0.5}}}) == half);
    CHECK(trained_with(text, 2e-3, {.groups = {{.match = "*", .rate = 1}}}) == half);
    CHECK(trained_with(text, 4e-3, {}) != half);
  }

  TEST_CASE("adapters alone are trained, and learn") {
    const Text text(4000);
    auto model = zamba_test::random_model<TwoAdapted, float>();
    const auto initial = zamba_test::random_model<TwoAdapted, float>();
    auto options = small();
    options.adamw.groups = {{.match = "*adapter*"}, {.match = "*", .frozen = true}};
    options.held_out = text.parts.held_out;
    Trainer trainer(model, two_phases(text, 40 * 96), options);
    const double before = trainer.held_out_bits_per_byte();
    trainer.run();
    CHECK(trainer.held_out_bits_per_byte() < before);
    Index adapters = 0;
    for (const ParameterEntry& entry : model.entries()) {
      CAPTURE(entry.name);
      CHECK((model.read(entry) != initial.read(entry)) == is_adapter(entry));
      adapters += is_adapter(entry);
    }
    CHECK(adapters >= 3);
  }

  TEST_CASE("a run is continued with what its groups came to, and the difference is named") {
    const Text text(4000);
    const TemporaryFolder folder, ungrouped, whole;
    const auto phases = two_phases(text, 4 * 96);
    const auto with = [](const std::filesystem::path& path, std::vector<ParameterGroup> groups) {
      auto options = small(path);
      options.adamw.groups = std::move(groups);
      return options;
    };
    const std::vector<ParameterGroup> groups{{.match = "embedding.*", .frozen = true},
                                             {.match = "shared.*", .rate = 0.1}};
    const auto refusal = [&](const TrainerOptions& options) {
      auto model = zamba_test::random_model<Hybrid, float>();
      return error_of([&] { Trainer(model, phases, options); });
    };
    auto model = zamba_test::random_model<Hybrid, float>(), other = zamba_test::random_model<Hybrid, float>();
    Trainer(model, phases, with(folder.path, groups)).run_phase();
    Trainer(other, phases, small(ungrouped.path)).run_phase();

    const std::string text_of_groups =
        "'frozen from embedding.weight, 0.1 from shared.0.input_norm.weight, 1.0 from layers.0.norm.weight'";
    std::string message = refusal(small(folder.path));
    INFO(message);
    CHECK(has(message, "adamw.groups: " + text_of_groups));
    CHECK(has(message, text_of_groups + " in the checkpoint, nothing now"));
    message = refusal(with(ungrouped.path, groups));
    CHECK(has(message, "adamw.groups: nothing in the checkpoint, " + text_of_groups));
    message =
        refusal(with(folder.path, {{.match = "embedding.*", .frozen = true}, {.match = "shared.*", .rate = 0.2}}));
    CHECK(has(message, "' in the checkpoint, 'frozen from embedding.weight, 0.2 from shared.0.input_norm.weight, "));
    CHECK(refusal(with(ungrouped.path, {{.match = "*"}})) == "");  // no other arithmetic

    // The same by other groups; and it ends as a run in one piece.
    const auto by_function = [](const ParameterEntry& entry) { return begins(entry, "shared."); };
    auto again = zamba_test::random_model<Hybrid, float>(Seed{8});
    Trainer(again, phases,
            with(folder.path,
                 {{.match = by_function, .rate = 0.1}, {.match = "embedding.weight", .frozen = true}, {.match = "*"}}))
        .run();
    auto in_one = zamba_test::random_model<Hybrid, float>();
    Trainer(in_one, phases, with(whole.path, groups)).run();
    CHECK((zamba_test::read_text(folder.path / "checkpoint.safetensors") ==
           zamba_test::read_text(whole.path / "checkpoint.safetensors")));
  }

  TEST_CASE("groups that make no sense are refused by name, before anything is written") {
    const Text text(4000);
    const TemporaryFolder folder;
    auto model = zamba_test::random_model<Hybrid, float>();
    const auto refusal = [&](std::vector<ParameterGroup> groups) {
      auto options = small(folder.path);
      options.adamw.groups = std::move(groups);
      return error_of([&] { Trainer(model, two_phases(text, 960), options); });
    };
    CHECK(refusal({{.match = "shared.*"}, {.match = "shard.*", .frozen = true}}) ==
          "zamba: AdamW: parameter group 2, 'shard.*', matches no parameter; their names are those of model.entries(), "
          "from 'embedding.weight' to 'final_norm.weight'");
    CHECK(has(refusal({{.match = ""}}), "parameter group 1, '', matches no parameter"));
    CHECK(has(refusal({{.match = [](const ParameterEntry&) { return false; }}}),
              "parameter group 1, of a function, matches no parameter"));
    CHECK(has(refusal({{.match = std::function<bool(const ParameterEntry&)>(), .rate = 2}}),
              "parameter group 1, of a function, which is empty, says of no parameter whether it is meant"));
    CHECK(has(refusal({{.match = "shared.*"}, {.match = "*"}, {.match = "shared.*", .rate = 0.1}}),
              "parameter group 3, 'shared.*', matches only parameters that groups before it match"));
    for (const double rate : {0., -1., std::nan(""), HUGE_VAL, -HUGE_VAL})
      CHECK(has(refusal({{.match = "shared.*", .rate = rate}}), "parameter group 1, 'shared.*', has a rate of "));
    CHECK(has(refusal({{.match = "*norm*", .rate = 0.1, .frozen = true}}),
              "parameter group 1, '*norm*', is frozen, and has a rate of 0.1 that would do nothing"));
    CHECK(refusal({{.match = "*", .frozen = true}}) ==
          "zamba: AdamW: every parameter is frozen, so there is nothing to train");
    CHECK(
        has(refusal({{.match = "shared.*", .rate = 1e4}}),
            "Trainer: phase 'pretraining': AdamW: a learning rate of 40, multiplied by the rate of a parameter group, "
            "and a weight_decay of 0.1 have a product above 1"));
    CHECK(has(refusal({{.match = "shared.*", .rate = 1e300}}),
              "AdamW: a learning rate of 4e+297, multiplied by the rate of a parameter group, is too large"));
    CHECK(!std::filesystem::exists(folder.path / "log.jsonl"));
    CHECK(refusal({{.match = "shared.*", .rate = 1e-300}}) == "");
  }

  TEST_CASE("the norm of gradients is computed with any context") {
    const Stepped<double> stepped;
    const auto gradients = stepped.gradients(2);
    double squared = 0;
    for (const double value :
         std::vector<double>(gradients.values().data, gradients.values().data + gradients.values().size()))
      squared += value * value;
    Context<cpu> ctx(2);
    CHECK(global_norm(ctx, gradients) == std::sqrt(squared));
    CHECK(global_norm(gradients) == std::sqrt(squared));
  }
}
