// SPDX-License-Identifier: MIT
// AdamW on a model: which parameters decay, the master copy, and its state. Eight steps against PyTorch's are part of
// check_reference; the arithmetic of one is tested in tests/ops/adamw_step.cpp.
#include <zamba/train/adamw.hpp>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>

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

TEST_CASE("adamw: steps too small for bf16 add up in the master copy") {
  Model<ZambaCase, bf16> model(Seed{1});
  const ParameterEntry& embedding = model.entries().front();
  model.write(embedding, std::vector<double>(embedding.size, 1.0));
  AdamW optimiser(model, {.weight_decay = 0, .clip_norm = 0});
  const auto gradients = gradients_of_one(model);
  optimiser.step(model, gradients, 1e-3);  // bf16's neighbours of 1 are 2^-8 below and 2^-7 above
  CHECK(model.read(embedding)[0] == 1.0);
  CHECK(optimiser.master()[embedding.offset] == doctest::Approx(0.999).epsilon(1e-6));
  for (int i = 0; i < 9; ++i) optimiser.step(model, gradients, 1e-3);
  CHECK(optimiser.steps() == 10);
  CHECK(optimiser.master()[embedding.offset] == doctest::Approx(0.99).epsilon(1e-6));
  CHECK(model.read(embedding)[0] == static_cast<double>(bf16(0.99f)));
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
  take(first.master(), second.master());
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
}
