// SPDX-License-Identifier: MIT
// Training on CUDA agrees with the CPU: losses, gradients through states, steps of AdamW; and is the same at every
// rerun, at every level of keeping, however a batch is cut.
#include <zamba/zamba.cuh>

#include <doctest/doctest.h>

#include "../support/documents.hpp"
#include "../support/extend_properties.hpp"
#include "../support/free_memory.hpp"
#include "../support/temporary_folder.hpp"
#include "../support/training_bytes.hpp"

namespace {

using namespace zamba_test;

/// Sizes that are multiples of nothing.
using Odd = LanguageModel<
    vocabulary,
    HybridStack<4, 2,
                MambaBlock<MambaConfig{.d_model = 39, .d_state = 7, .d_conv = 3, .dt_rank = 5, .proj_bias = true}>,
                SharedAttention<SharedAttentionConfig{.d_model = 39, .n_heads = 3, .d_ff = 77}>>>;
/// Rows of whole 16 bytes, a head_dim of 128, states of 16.
using Even =
    LanguageModel<vocabulary,
                  HybridStack<2, 2, MambaBlock<MambaConfig{.d_model = 128, .d_state = 16, .n_heads = 2}>,
                              SharedAttention<SharedAttentionConfig{.d_model = 128, .n_heads = 2, .d_ff = 256}>>>;

/// Loss, gradients, and what a state of the documents got: gradients of the initial one.
struct Result {
  double loss;
  std::vector<double> gradients, d_state;

  bool operator==(const Result&) const = default;
};

template <class F, class Device>
std::vector<double> host_values(Vector<F> there, Device) {
  std::vector<std::remove_const_t<F>> here(static_cast<std::size_t>(there.size()));
  Memory<Device>::copy_to_host(here.data(), there.data, here.size() * sizeof(F));
  return {here.begin(), here.end()};
}

/// The documents continue a state of five tokens a row where `past` says so; then the gradient of the final state is
/// that of the sum of its elements.
template <class Net, class T, class Device>
Result run(const Model<Net, T, Device>& model, const Documents& documents, bool past, Keep keep = Keep::everything) {
  using ModelType = Model<Net, T, Device>;
  Context<Device> ctx;
  auto gradients = model.new_gradients();
  gradients.zero();
  typename ModelType::GradientOptions options{.scale = 0.25, .keep = keep};
  if (!past) {
    const LossSum loss = model.loss_and_gradients(ctx, documents, gradients, options);
    return {loss.sum, host_values(gradients.values(), Device{}), {}};
  }
  const Index rows = static_cast<Index>(documents.offsets.size()) - 1;
  auto state = model.new_state({.batch = rows, .max_length = 5000});
  model.extend(ctx, state, {random_tokens(5 * rows), std::vector<Index>(static_cast<std::size_t>(rows), 5)});
  auto d_state = model.new_state_gradients(state);
  auto views = d_state.views();
  visit_state<Net>(views, [&](const Name&, auto& tensor, Index kind, Index) {
    using Element = std::remove_reference_t<decltype(*tensor.data)>;
    if (kind == per_position) return;
    const std::vector<Element> ones(static_cast<std::size_t>(tensor.size()), Element(0.01f));
    Memory<Device>::copy_from_host(tensor.data, ones.data(), ones.size() * sizeof(Element));
  });
  options.state = &state;
  options.d_state = &d_state;
  const LossSum loss = model.loss_and_gradients(ctx, documents, gradients, options);
  Result result{loss.sum, host_values(gradients.values(), Device{}), {}};
  visit_state<Net>(views, [&](const Name&, auto& tensor, Index, Index) {
    append(result.d_state, host_values(tensor.flat(), Device{}));
  });
  return result;
}

/// |CUDA - exact| / |exact|, where exact is the CPU in double with the same weights; bounds of losses and gradients.
template <class Net, class T>
void agrees(double bound_of_loss, double bound_of_gradients) {
  const auto on_cpu = random_model<Net, T>().template to<double>();
  const auto on_gpu = random_model<Net, T, cuda>();
  for (const Documents& documents : {Documents({70, 1, 0, 129, 3}), Documents({1}), Documents({300})})
    for (const bool past : {false, true}) {
      CAPTURE(documents.tokens.size());
      CAPTURE(past);
      const Result exact = run(on_cpu, documents, past), got = run(on_gpu, documents, past);
      CHECK(std::abs(got.loss - exact.loss) <= bound_of_loss * std::abs(exact.loss));
      CHECK(relative_error(got.gradients, exact.gradients) <= bound_of_gradients);
      if (past) CHECK(relative_error(got.d_state, exact.d_state) <= bound_of_gradients);
      CHECK(run(on_gpu, documents, past) == got);
      for (const Keep keep : {Keep::costly, Keep::layer_inputs}) CHECK(run(on_gpu, documents, past, keep) == got);
      CHECK(on_gpu.loss(documents).sum == run(on_gpu, documents, false).loss);
    }
}

/// Steps of AdamW on one batch: the losses before each, and the weights after them.
template <class Net, class T, class Device>
std::pair<std::vector<double>, std::vector<double>> train(int steps) {
  auto model = random_model<Net, T, Device>();
  const Documents documents({40, 25});
  auto gradients = model.new_gradients();
  AdamW optimiser(model);
  std::vector<double> losses, weights;
  for (int i = 0; i < steps; ++i) {
    gradients.zero();
    losses.push_back(model.loss_and_gradients(documents, gradients).sum);
    optimiser.step(model, gradients, 1e-3);
  }
  for (const ParameterEntry& entry : model.entries()) append(weights, model.read(entry));
  return {losses, weights};
}

template <class Net, class T>
void trains_alike(double bound) {
  const auto [losses, weights] = train<Net, T, cpu>(10);
  const auto [losses_there, weights_there] = train<Net, T, cuda>(10);
  CHECK(losses.back() < 0.9 * losses.front());
  CHECK(relative_error(losses_there, losses) <= bound);
  CHECK(relative_error(weights_there, weights) <= bound);
  CHECK(train<Net, T, cuda>(10) == std::pair(losses_there, weights_there));
}

/// The checkpoint of a run on one device is, loaded and saved on the other, the same file.
template <class Net, class T, class From, class To>
void carries_over() {
  const TemporaryFolder folder;
  const auto first = folder.path / "first", second = folder.path / "second";
  auto model = random_model<Net, T, From>();
  const Documents documents({40, 25});
  auto gradients = model.new_gradients();
  AdamW optimiser(model);
  for (int i = 0; i < 2; ++i) {
    model.loss_and_gradients(documents, gradients);
    optimiser.step(model, gradients, 1e-3);
  }
  save_checkpoint(first, model, optimiser);
  Model<Net, T, To> other(Seed{8});
  AdamW there(other);
  load_checkpoint(Safetensors::open(first), other, there);
  save_checkpoint(second, other, there);
  CHECK(read_text(first) == read_text(second));
}

}  // namespace

TEST_SUITE("cuda/training") {
  // In double both devices round in other orders of sums: some hundred roundings of 1.1e-16, magnified by the net.
  TEST_CASE("gradients in double") {
    agrees<TwoAdapted, double>(1e-13, 1e-11);
    agrees<Second, double>(1e-12, 1e-10);
    agrees<NestedTransformer, double>(1e-13, 1e-11);
  }
  TEST_CASE("gradients in float") { agrees<Odd, float>(1e-5, 1e-4); }
  // Activations of 8 bits: 2^-9 each, through some ten layers forward and back.
  TEST_CASE("gradients in bf16") {
    agrees<Even, bf16>(1e-2, 0.15);
    agrees<SecondWide, bf16>(1e-2, 0.15);
  }
  TEST_CASE("steps of AdamW") {
    trains_alike<TwoAdapted, double>(1e-9);
    trains_alike<Odd, float>(1e-3);
    trains_alike<Even, bf16>(3e-2);
  }

  TEST_CASE("checkpoints of either device are continued on the other") {
    carries_over<Even, bf16, cpu, cuda>();
    carries_over<Even, bf16, cuda, cpu>();
    carries_over<Odd, float, cuda, cpu>();
  }

  TEST_CASE("a step takes what was announced") {
    for (const Index length : {5, 200}) {
      check_training_bytes<TwoAdapted, double, cuda>(length);
      check_training_bytes<NestedTransformer, double, cuda>(length);
      check_training_bytes<Odd, float, cuda>(length);
      check_training_bytes<Even, bf16, cuda>(length);
      check_training_bytes<SecondWide, bf16, cuda>(length);
    }
  }

  TEST_CASE("a step that does not fit is refused part by part, and the model can be used") {
    const auto model = random_model<Even, bf16, cuda>();
    const Documents documents({1500});
    auto gradients = model.new_gradients();
    auto ctx = zamba::testing::new_context<cuda>(1);
    auto taken = all_free_memory<cuda>(std::size_t{1} << 20);  // what the step needs is more
    std::string message;
    try {
      model.loss_and_gradients(ctx, documents, gradients, {});
    } catch (const OutOfMemory& error) {
      message = error.what();
    }
    CAPTURE(message);
    CHECK(message.starts_with("zamba: loss_and_gradients: out of memory on cuda: "));
    for (const char* part : {" weights ", " + gradients ", " + moments ", " + activations ", " + workspace "})
      CHECK(message.find(part) != std::string::npos);
    for (const double value : host_values(gradients.values(), cuda{})) REQUIRE(value == 0);
    taken.clear();
    CHECK(model.loss_and_gradients(ctx, documents, gradients, {}).sum == run(model, documents, false).loss);
  }
}
