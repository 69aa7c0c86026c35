// SPDX-License-Identifier: MIT
// What a step of training takes beside what training_bytes says.
#pragma once

#include <vector>

#include <doctest/doctest.h>

#include <zamba/train/adamw.hpp>

#include "tests/support/devices.hpp"
#include "tests/support/nets.hpp"

namespace zamba_test {

/// A step takes what was announced at most, and that was at most 5 % too much.
template <class Net, class T, class Device>
void check_training_bytes(Index length) {
  using M = Model<Net, T, Device>;
  constexpr int threads = 2;
  constexpr Index rows = 3;
  auto model = random_model<Net, T, Device>();
  auto gradients = model.new_gradients();
  const std::vector<Token> tokens = random_tokens(rows * length);
  const std::vector<Index> offsets{0, length, 2 * length, 3 * length};
  for (const Keep keep : {Keep::layer_inputs, Keep::costly, Keep::everything}) {
    CAPTURE(static_cast<int>(keep));
    CAPTURE(length);
    const TrainingBytes bytes = M::training_bytes({rows, length, keep}, threads);
    AdamW optimiser(model);
    auto ctx = zamba::testing::new_context<Device>(threads);
    model.loss_and_gradients(ctx, {tokens, tokens, offsets}, gradients, {.keep = keep});
    optimiser.step(ctx, model, gradients, 1e-3);
    const auto announced = static_cast<double>(bytes.activations + bytes.workspace),
               taken = static_cast<double>(ctx.arena().peak());
    CHECK(taken <= announced);
    CHECK(announced <= 1.05 * taken);
    // The moments, two bytes beside each bf16 weight, and gaps.
    const auto elements = static_cast<std::size_t>(gradients.values().size());
    const std::size_t each = 2 * sizeof(compute_t<T>) + (std::is_same_v<T, bf16> ? 2 : 0);
    CHECK(bytes.gradients == elements * sizeof(compute_t<T>));
    CHECK(bytes.moments >= elements * each);
    CHECK(bytes.moments <= elements * each + 4 * alignment);
  }
}

}  // namespace zamba_test
