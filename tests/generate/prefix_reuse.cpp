// SPDX-License-Identifier: MIT
// One state for what many requests begin with, copied for each: no header of its own, but a promise of State.
#include <doctest/doctest.h>
#include <zamba/generate/generator.hpp>

#include "../support/devices.hpp"
#include "../support/nets.hpp"

namespace {

using namespace zamba_test;

std::vector<Token> joined(std::vector<Token> a, const std::vector<Token>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

TEST_SUITE("generate/prefix_reuse") {
  TEST_CASE("a request over a copied state gets the tokens of the whole prompt") {
    const auto model = random_model<TwoCopies, double, TestDevice>();
    const GenerationOptions greedy{.sampling = {.temperature = 0}, .max_new_tokens = 20};
    const std::vector<Token> common = random_tokens(37);
    const std::vector<std::vector<Token>> requests{{3}, {1, 4, 1, 5}, {9, 2, 6}};
    auto prefix = model.new_state({.max_length = 80});
    model.extend(prefix, common);
    const auto before = prefix.to_bytes();

    auto batch = prefix.gather(std::vector<Index>(3, 0));
    const auto together = generate(model, batch, requests, greedy);
    for (std::size_t i = 0; i < 3; ++i) {
      auto copy = prefix, whole = model.new_state({.max_length = 80});
      const auto wanted = generate(model, whole, joined(common, requests[i]), greedy);
      CHECK(generate(model, copy, requests[i], greedy) == wanted);
      CHECK(together[i] == wanted);
      CHECK(relative_error(values(copy), values(whole)) < 1e-13);  // every split, as docs/numerics.md has it
    }
    CHECK(prefix.to_bytes() == before);  // bit by bit what it was
  }
}
