// SPDX-License-Identifier: MIT
// What a step of training takes is what training_bytes says, and is said where there is not enough of it.
#include "tests/support/training_bytes.hpp"

#include <sys/resource.h>

#include <span>
#include <string>
#include <vector>

#include <zamba/testing/sanitized.hpp>

namespace {

using namespace zamba_test;

TEST_SUITE("train/training_bytes") {
  TEST_CASE("a step takes what was announced: every kind of network") {
    for (const Index length : {5, 200}) {
      check_training_bytes<TwoAdapted, float, cpu>(length);
      check_training_bytes<NestedTransformer, float, cpu>(length);
      check_training_bytes<Second, bf16, cpu>(length);
      check_training_bytes<SecondWide, bf16, cpu>(length);
    }
  }

#ifndef ZAMBA_TEST_SANITIZED  // which end the program where memory does not suffice
  TEST_CASE("a step that does not fit is refused part by part, before anything is computed, and a smaller one is had") {
    const auto model = random_model<Hybrid, bf16>();
    auto gradients = model.new_gradients();
    const std::vector<Token> tokens = random_tokens(20'000);
    const std::vector<Index> offsets{0, 10'000, 20'000}, fewer{0, 60, 120};
    Context<cpu> ctx(1);
    // No further memory than the process has: what is small comes from what it gave back.
    struct rlimit old {};
    REQUIRE(::getrlimit(RLIMIT_AS, &old) == 0);
    struct rlimit limit = old;
    limit.rlim_cur = 1;
    REQUIRE(::setrlimit(RLIMIT_AS, &limit) == 0);
    std::string message;
    try {
      model.loss_and_gradients(ctx, {tokens, tokens, offsets}, gradients, {});
    } catch (const OutOfMemory& error) {
      message = error.what();
    }
    REQUIRE(::setrlimit(RLIMIT_AS, &old) == 0);
    CAPTURE(message);
    const TrainingBytes bytes = decltype(model)::training_bytes({2, 10'000}, 1);
    const auto part = [](const char* name, std::size_t size) { return name + std::to_string(size); };
    CHECK(message.starts_with("zamba: loss_and_gradients: out of memory on cpu: "));
    CHECK(message.find(part("", bytes.total()) + part(" bytes in all, weights ", bytes.weights) +
                       part(" + gradients ", bytes.gradients) + part(" + moments ", bytes.moments) +
                       part(" + activations ", bytes.activations) + part(" + workspace ", bytes.workspace) + "; ") !=
          std::string::npos);
    for (Index i = 0; i < gradients.values().size(); ++i) REQUIRE(gradients.values()[i] == 0);
    const std::span<const Token> some(tokens.data(), 120);
    CHECK_NOTHROW(model.loss_and_gradients(ctx, {some, some, fewer}, gradients, {}));
  }
#endif
}

}  // namespace
