// SPDX-License-Identifier: MIT
// Decoding allocates nothing after the first token.
#include <zamba/generate/generator.hpp>

#include <doctest/doctest.h>

#include "../support/allocations.hpp"
#include "../support/nets.hpp"

namespace {

using namespace zamba_test;

/// A step's allocations in a batch of `rows`, after the first: at most, over twenty steps.
template <class Net, class T>
long allocations_of_a_step(Index rows, int threads, const SamplerOptions& sampling) {
  const auto model = random_model<Net, T>();
  Context<cpu> ctx(threads);
  auto state = model.new_state({.batch = rows, .max_length = 64});
  std::vector<std::vector<Token>> prompts;
  for (Index row = 0; row < rows; ++row) prompts.push_back(random_tokens(3 + row % 4, static_cast<std::uint64_t>(row)));
  long before = 0, most = 0;
  Index steps = 0;
  const auto callback = [&](Index row, Token) {
    if (row != 0) return true;
    const long now = allocations.load();
    if (++steps > 2) most = std::max(most, now - before);
    before = now;
    return true;
  };
  generate(ctx, model, state, std::span<const std::vector<Token>>(prompts),
           {.sampling = sampling, .max_new_tokens = 22, .seed = {1}}, callback);
  CHECK(steps == 22);
  return most;
}

}  // namespace

TEST_SUITE("decode_allocations") {
  TEST_CASE("decoding allocates nothing after the first token") {
    const long before = allocations.load();
    ::operator delete(::operator new(100));
    void* aligned = ::operator new (64, std::align_val_t{64});
    ::operator delete (aligned, std::align_val_t{64});
    REQUIRE(allocations.load() - before >= 2);  // they are counted
    for (const int threads : {1, 2})
      for (const Index rows : {1, 5, 20}) {
        CAPTURE(threads);
        CAPTURE(rows);
        CHECK(allocations_of_a_step<Hybrid, float>(rows, threads, {.temperature = 0}) == 0);
        CHECK(allocations_of_a_step<Hybrid2, float>(rows, threads, {.temperature = 0}) == 0);
        CHECK(allocations_of_a_step<Transformer, float>(rows, threads, {.temperature = 0}) == 0);
        CHECK(allocations_of_a_step<TwoAdapted, float>(rows, threads, {.temperature = 0}) == 0);
        CHECK(allocations_of_a_step<Hybrid, bf16>(rows, threads,
                                                  {.top_k = 9, .top_p = 0.9, .repetition_penalty = 1.2}) == 0);
      }
  }
}
