// SPDX-License-Identifier: MIT
// Threads that share a const Model, each with a State and a Context of its own.
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/generate/generator.hpp>

#include "../support/nets.hpp"

namespace {

using namespace zamba_test;

using Ids = std::vector<Token>;

Ids generated(const Model<Hybrid, float>& model, Token first) {
  auto state = model.new_state({.max_length = 64});
  return generate(model, state, Ids{first, 2, 3}, {.max_new_tokens = 30, .seed = {9}});
}

std::vector<double> gradients_of(const Model<Hybrid, float>& model, Token first) {
  const Ids tokens{first, 2, 3, 4, 5, 6}, targets{2, 3, 4, 5, 6, 7};
  const std::vector<Index> offsets{0, 2, 6};
  auto gradients = model.new_gradients();
  model.loss_and_gradients({tokens, targets, offsets}, gradients);
  return {gradients.values().data, gradients.values().data + gradients.values().size()};
}

}  // namespace

TEST_SUITE("shared_model") {
  TEST_CASE("two threads share a const model and get what one thread gets") {
    const auto model = random_model<Hybrid, float>();
    const int count = 2;
    std::vector<Ids> wanted(count), got(count);
    std::vector<std::vector<double>> wanted_gradients(count), got_gradients(count);
    for (int i = 0; i < count; ++i) {
      wanted[i] = generated(model, i);
      wanted_gradients[i] = gradients_of(model, i);
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i)
      threads.emplace_back([&, i] {
        got[i] = generated(model, i);
        got_gradients[i] = gradients_of(model, i);
      });
    for (auto& thread : threads) thread.join();
    CHECK(got == wanted);
    CHECK(got_gradients == wanted_gradients);
    CHECK(wanted[0] != wanted[1]);
    CHECK(wanted[0].size() == 30);
  }
}
