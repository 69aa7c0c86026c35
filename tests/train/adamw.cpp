// SPDX-License-Identifier: MIT
// AdamW on a model: which parameters decay, masters of bf16 weights, and its state. Eight steps against PyTorch's are
// part of check_reference; the arithmetic of one is tested in tests/ops/adamw_step.cpp.
#include <zamba/train/adamw.hpp>

#include <cmath>
#include <limits>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>
#include <tests/support/training.hpp>

using namespace zamba_test;

namespace {

/// Gradients of 1 everywhere, but for the gaps between parameters.
template <class ModelType>
auto gradients_of_one(const ModelType& model) {
  auto gradients = model.new_gradients();
  for (const ParameterEntry& entry : model.entries())
    for (Index i = 0; i < entry.size; ++i) gradients.values()[entry.offset + i] = 1;
  return gradients;
}

}  // namespace

TEST_CASE("adamw: only parameters that are listed so decay") {
  Model<ZambaCase, double> model(Seed{1});
  const auto gradients = model.new_gradients();  // zero: what moves is the decay
  AdamW optimiser(model, {.weight_decay = 0.5});
  for (const ParameterEntry& entry : model.entries()) model.write(entry, std::vector<double>(entry.size, 2.0));
  optimiser.step(model, gradients, 0.1);
  for (const ParameterEntry& entry : model.entries()) {
    CAPTURE(entry.name);
    const auto ends_with = [&](const char* end) { return entry.name.ends_with(end); };
    const bool kept = ends_with("A_log") || ends_with(".D") || ends_with("bias") || ends_with("conv1d.weight") ||
                      ends_with("norm.weight");
    for (const double value : model.read(entry)) REQUIRE(value == doctest::Approx(kept ? 2.0 : 1.9).epsilon(1e-15));
  }
}

TEST_CASE("adamw: the gradients' norm is that of all together, and clipping scales by it") {
  Model<ZambaCase, float> model(Seed{1});
  const auto gradients = gradients_of_one(model);
  const double norm = std::sqrt(static_cast<double>(parameter_count<ZambaCase>));
  CHECK(global_norm(gradients) == doctest::Approx(norm).epsilon(1e-12));
  AdamW optimiser(model, {.clip_norm = 1});
  optimiser.step(model, gradients, 1e-3);
  CHECK(optimiser.gradient_norm() == doctest::Approx(norm).epsilon(1e-12));
  CHECK(optimiser.first_moments()[0] == doctest::Approx(0.1 / norm).epsilon(1e-5));
}

TEST_CASE("adamw: steps too small for bf16 add up in the masters") {
  Model<ZambaCase, bf16> model(Seed{1});
  const ParameterEntry& embedding = model.entries().front();
  model.write(embedding, std::vector<double>(embedding.size, 1.0));
  AdamW optimiser(model, {.weight_decay = 0, .clip_norm = 0});
  const auto gradients = gradients_of_one(model);
  const auto master = [&] { return masters_of(model, optimiser, embedding)[0]; };
  optimiser.step(model, gradients, 1e-3);  // bf16's neighbours of 1 are 2^-8 below and 2^-7 above
  CHECK(model.read(embedding)[0] == 1.0);
  CHECK(master() == doctest::Approx(0.999).epsilon(1e-6));
  for (int i = 0; i < 9; ++i) optimiser.step(model, gradients, 1e-3);
  CHECK(optimiser.steps() == 10);
  CHECK(master() == doctest::Approx(0.99).epsilon(1e-6));
  CHECK(model.read(embedding)[0] == static_cast<double>(bf16(0.99f)));
}

TEST_CASE("adamw: bf16 weights are stepped to the bits of float weights, and are the bf16 nearest to these") {
  Model<ZambaCase, bf16> model(Seed{1});
  Model<ZambaCase, float> wide = model.to<float>();
  auto gradients = gradients_of_one(model);
  auto same_gradients = gradients_of_one(wide);
  AdamW optimiser(model, {.weight_decay = 0.2});
  AdamW exact(wide, {.weight_decay = 0.2});
  for (int step = 0; step < 6; ++step) {
    for (Index i = 0; i < gradients.values().size(); ++i)
      same_gradients.values()[i] = gradients.values()[i] = 0.3f * static_cast<float>((i + step * step) % 11 - 5);
    optimiser.step(model, gradients, 3e-3);
    exact.step(wide, same_gradients, 3e-3);
    for (std::size_t i = 0; i < model.entries().size(); ++i) {
      const ParameterEntry& entry = model.entries()[i];
      const auto masters = masters_of(model, optimiser, entry), weights = model.read(entry);
      REQUIRE(masters == wide.read(wide.entries()[i]));
      for (std::size_t k = 0; k < weights.size() && !entry.precise; ++k)
        REQUIRE(weights[k] == static_cast<float>(SplitFloat(static_cast<float>(masters[k])).nearest));
    }
  }
  CHECK(std::equal(optimiser.first_moments().data, optimiser.first_moments().data + gradients.values().size(),
                   exact.first_moments().data));
}

TEST_CASE("adamw: weights that are written between steps are what is stepped, in bf16 too") {
  Model<ZambaCase, bf16> model(Seed{1});
  const auto gradients = gradients_of_one(model);
  AdamW optimiser(model, {.weight_decay = 0, .clip_norm = 0});
  optimiser.step(model, gradients, 1e-3);
  const ParameterEntry& embedding = model.entries().front();
  for (const double written : {0.0, -0.0, 0.5}) {
    model.write(embedding, std::vector<double>(embedding.size, written));
    optimiser.step(model, gradients, 1e-3);
    for (const double master : masters_of(model, optimiser, embedding))
      REQUIRE(master == doctest::Approx(written - 1e-3).epsilon(0x1p-8));
  }
}

TEST_CASE("adamw: an optimiser given another's state goes on bit by bit") {
  Model<ZambaCase, bf16> model(Seed{1});
  auto gradients = gradients_of_one(model);
  AdamW first(model);
  first.step(model, gradients, 1e-3);

  auto copy = model.to<bf16>();
  AdamW second(copy);
  const auto take = [](auto from, auto to) { std::copy_n(from.data, from.size(), to.data); };
  take(first.first_moments(), second.first_moments());
  take(first.second_moments(), second.second_moments());
  take(first.lower_halves(), second.lower_halves());
  second.set_steps(first.steps());

  for (Index i = 0; i < gradients.values().size(); ++i) gradients.values()[i] *= 0.25f * static_cast<float>(i % 7);
  first.step(model, gradients, 1e-3);
  second.step(copy, gradients, 1e-3);
  for (const ParameterEntry& entry : model.entries()) REQUIRE(model.read(entry) == copy.read(entry));
}

TEST_CASE("adamw: a step takes no new memory after the first, whatever the number of threads") {
  Model<ZambaCase, float> model(Seed{1}), other = model.to<float>();
  const auto gradients = gradients_of_one(model);
  AdamW optimiser(model), other_optimiser(other);
  Context<cpu> ctx(2), one(1);
  optimiser.step(ctx, model, gradients, 1e-3);
  const std::size_t capacity = ctx.arena().capacity();
  for (int i = 0; i < 3; ++i) optimiser.step(ctx, model, gradients, 1e-3);
  CHECK(ctx.arena().capacity() == capacity);
  for (int i = 0; i < 4; ++i) other_optimiser.step(one, other, gradients, 1e-3);
  for (const ParameterEntry& entry : model.entries()) REQUIRE(model.read(entry) == other.read(entry));
}

namespace {

template <class T>
std::vector<double> all_of(const Model<ZambaCase, T>& model, const AdamW<ZambaCase, T, cpu>& optimiser) {
  std::vector<double> all{static_cast<double>(optimiser.steps())};
  for (const ParameterEntry& entry : model.entries())
    for (const double value : model.read(entry)) all.push_back(value);
  for (const auto& part : {optimiser.first_moments(), optimiser.second_moments()})
    all.insert(all.end(), part.data, part.data + part.size());
  for (const ParameterEntry& entry : model.entries())
    for (const double value : masters_of(model, optimiser, entry)) all.push_back(value);
  return all;
}

/// One gradient of `large` beside zeros moves its weight by the rate, as it would in PyTorch, and the next ones too.
template <class T>
void takes_exploding_gradients(double large) {
  CAPTURE(large);
  Model<ZambaCase, T> model(Seed{1});
  auto gradients = model.new_gradients();
  const ParameterEntry& entry = model.entries()[model.entries().size() / 2];
  const Index at = entry.offset + entry.size / 2;
  AdamW optimiser(model, {.weight_decay = 0});
  using F = compute_t<T>;
  gradients.values()[at] = static_cast<F>(large);
  double m = 0, v = 0;
  for (int t = 1; t <= 5; ++t) {  // the explosion, then gradients of 0.5
    optimiser.step(model, gradients, 1e-2);
    const double g = t == 1 ? 1 : 0.5;
    m = 0.9 * m + 0.1 * g;
    v = 0.95 * v + 0.05 * g * g;
    REQUIRE(optimiser.first_moments()[at] == doctest::Approx(m).epsilon(1e-5));
    REQUIRE(optimiser.second_moments()[at] == doctest::Approx(v).epsilon(1e-5));
    gradients.values()[at] = static_cast<F>(0.5);
  }
  for (const double value : all_of(model, optimiser)) REQUIRE(std::isfinite(value));
}

/// A gradient that is not finite is no step, and the next good one is.
template <class T>
void refuses_gradients(double bad, double clip_norm) {
  CAPTURE(bad);
  CAPTURE(clip_norm);
  Model<ZambaCase, T> model(Seed{1});
  const auto good = gradients_of_one(model);
  auto gradients = gradients_of_one(model);
  AdamW optimiser(model, {.clip_norm = clip_norm});
  optimiser.step(model, good, 1e-3);
  const auto before = all_of(model, optimiser);
  const ParameterEntry& entry = model.entries()[7];
  gradients.values()[entry.offset + 5] = static_cast<compute_t<T>>(bad);
  const std::string message = message_of([&] { optimiser.step(model, gradients, 1e-3); });
  CHECK(contains(message, "AdamW: the norm of the gradients is "));
  CHECK(contains(message, "element 5 of that of '" + entry.name + "'"));
  CHECK(all_of(model, optimiser) == before);
  optimiser.step(model, good, 1e-3);
  CHECK(optimiser.steps() == 2);
}

}  // namespace

TEST_CASE("adamw: gradients that are large and finite are clipped, not squared to infinity") {
  for (const double large : {1e10, 1e18, 1.9e19, 1e20, 1e30, 3e38}) {
    takes_exploding_gradients<float>(large);
    takes_exploding_gradients<bf16>(large);
    takes_exploding_gradients<double>(large);
  }
}

TEST_CASE("adamw: with gradients that are not finite no step is taken, clipped or not, and they are named") {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL})
    for (const double clip_norm : {0., 1., HUGE_VAL}) {
      refuses_gradients<float>(bad, clip_norm);
      refuses_gradients<bf16>(bad, clip_norm);
      refuses_gradients<double>(bad, clip_norm);
    }
  // Finite, but no float holds its square, and nothing clips it.
  Model<ZambaCase, float> model(Seed{1});
  auto gradients = model.new_gradients();
  gradients.values()[0] = 2e19f;
  AdamW optimiser(model, {.clip_norm = 0});
  const auto before = all_of(model, optimiser);
  CHECK(contains(message_of([&] { optimiser.step(model, gradients, 1e-3); }),
                 "the norm of the gradients is 2e+19, too large for second moments without clip_norm"));
  CHECK(all_of(model, optimiser) == before);
}

TEST_CASE("adamw: a rate that no step should have") {
  Model<ZambaCase, float> model(Seed{1});
  const auto gradients = gradients_of_one(model);
  AdamW optimiser(model);
  const auto before = all_of(model, optimiser);
  for (const double rate : {std::nan(""), HUGE_VAL, -HUGE_VAL, -1e-3})
    CHECK(contains(message_of([&] { optimiser.step(model, gradients, rate); }),
                   "AdamW: the learning rate must be finite and 0 or more, got "));
  CHECK(contains(message_of([&] { optimiser.step(model, gradients, 1e38); }), "a learning rate of 1e+38 is too large"));
  CHECK(contains(message_of([&] { optimiser.step(model, gradients, 10.5); }),
                 "a learning rate of 10.5 and a weight_decay of 0.1 have a product above 1"));
  CHECK(all_of(model, optimiser) == before);
  CHECK_NOTHROW(optimiser.step(model, gradients, 0));
  CHECK_THROWS_AS(optimiser.set_steps(-1), Error);
  CHECK_THROWS_AS(optimiser.set_steps(std::numeric_limits<Index>::max()), Error);
}

TEST_CASE("adamw: zeroed gradients do not freeze a parameter: it decays, and its momentum goes on") {
  Model<ZambaCase, double> model(Seed{1});
  const ParameterEntry& embedding = model.entries().front();
  model.write(embedding, std::vector<double>(embedding.size, 1.0));
  auto gradients = gradients_of_one(model);
  AdamW optimiser(model, {.clip_norm = 0});
  optimiser.step(model, gradients, 0.1);
  const double after_first = model.read(embedding)[0];
  gradients.zero();
  optimiser.step(model, gradients, 0.1);
  // m and v of a gradient of 1, then of 0, with their bias corrections.
  const double m = 0.09 / (1 - 0.81), v = 0.05 * 0.95 / (1 - 0.95 * 0.95);
  CHECK(model.read(embedding)[0] ==
        doctest::Approx(after_first * (1 - 0.1 * 0.1) - 0.1 * m / (std::sqrt(v) + 1e-8)).epsilon(1e-14));
}

TEST_CASE("adamw: options out of range") {
  const Model<ZambaCase, float> model(Seed{1});
  const auto message = [&](AdamWOptions options) {
    return message_of([&] { AdamW<ZambaCase, float, cpu> optimiser(model, options); });
  };
  CHECK(contains(message({.beta1 = 1}), "beta1 and beta2 must be in [0, 1), got 1"));
  CHECK(contains(message({.beta2 = -0.1}), "got 0.9 and -0.1"));
  CHECK(contains(message({.eps = 0}), "eps must be positive"));
  CHECK(contains(message({.weight_decay = -1}), "weight_decay"));
  CHECK(contains(message({.clip_norm = std::nan("")}), "clip_norm"));
  CHECK(message({}) == "");
  for (const double beta : {std::nan(""), HUGE_VAL, 1 - 1e-9}) {  // the last is 1 in float
    CHECK(contains(message({.beta1 = beta}), "beta1 and beta2 must be in [0, 1)"));
    CHECK(contains(message({.beta2 = beta}), "beta1 and beta2 must be in [0, 1)"));
  }
  for (const double eps : {std::nan(""), HUGE_VAL, 1e-300, 1e300, 1e-46, -1e-8})
    CHECK(contains(message({.eps = eps}), "eps must be positive and a number of float"));
  for (const double decay : {std::nan(""), HUGE_VAL, -0.1})
    CHECK(contains(message({.weight_decay = decay}), "weight_decay must be finite and 0 or more, got "));
  for (const double clip : {-HUGE_VAL, -1., 1e-320})
    CHECK(contains(message({.clip_norm = clip}), "clip_norm must be 0"));
  CHECK(message({.clip_norm = HUGE_VAL}) == "");  // a norm that is never reached
  // What double holds and float does not.
  const Model<ZambaCase, double> wide(Seed{1});
  CHECK_NOTHROW(AdamW<ZambaCase, double, cpu>(wide, {.beta1 = 1 - 1e-9, .eps = 1e-300, .clip_norm = 1e-300}));
}
