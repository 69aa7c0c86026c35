// SPDX-License-Identifier: MIT
// How much memory a model wants is known before it is taken, and said where there is not enough.
#include <zamba/model.hpp>

#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/testing/sanitized.hpp>

#include "support/devices.hpp"
#include "support/nets.hpp"

// workspace.cu names another one.
#ifndef ZAMBA_TEST_DEVICE
#define ZAMBA_TEST_DEVICE cpu
#endif

namespace {

using namespace zamba_test;

constexpr int threads = 2;

template <class M>
std::size_t bytes_of_logits(Index rows) {
  return static_cast<std::size_t>(rows * vocabulary) * sizeof(typename M::A);
}

/// What extend() holds beside weights and state is what was announced, at most, and is taken once.
template <class Net, class T, class Device>
void check_workspace() {
  using M = Model<Net, T, Device>;
  const M model = random_model<Net, T, Device>();
  const Index chunk = DeviceTraits<Device>::prefill_chunk;
  for (const StateOptions options : {StateOptions{1, 12}, {1, chunk + 40}, {5, 3 * chunk}, {70, 20}}) {
    CAPTURE(options.batch);
    CAPTURE(options.max_length);
    const std::size_t announced = M::workspace_bytes(options, threads);
    auto ctx = zamba::testing::new_context<Device>(threads);
    const auto held = [&] { return ctx.arena().capacity() + bytes_of_logits<M>(options.batch); };
    const auto extend = [&](auto& state, const std::vector<Index>& lengths) {
      model.extend(ctx, state, {random_tokens(std::accumulate(lengths.begin(), lengths.end(), Index{0})), lengths});
    };
    auto state = model.new_state(options);
    std::vector<Index> lengths(static_cast<std::size_t>(options.batch), 1);
    lengths[0] = options.max_length - 7;
    extend(state, lengths);
    CHECK(ctx.arena().generation() == 1);
    CHECK(held() <= announced);
    extend(state, std::vector<Index>(lengths.size(), 1));
    extend(state, std::vector<Index>(lengths.size(), 4));
    auto full = model.new_state(options);
    extend(full, std::vector<Index>(lengths.size(), options.max_length));
    CHECK(held() <= announced);
    CHECK(static_cast<double>(announced) <= 1.3 * static_cast<double>(held()));
    const auto generation = ctx.arena().generation();
    extend(state, std::vector<Index>(lengths.size(), 1));
    CHECK(ctx.arena().generation() == generation);
  }
}

TEST_SUITE("workspace") {
  TEST_CASE("it is known before it is taken: every kind of network in bf16") {
    check_workspace<Hybrid, bf16, ZAMBA_TEST_DEVICE>();
    check_workspace<TwoAdapted, bf16, ZAMBA_TEST_DEVICE>();
    check_workspace<Plain, bf16, ZAMBA_TEST_DEVICE>();
    check_workspace<NestedAdapted, bf16, ZAMBA_TEST_DEVICE>();
    check_workspace<Hybrid2, bf16, ZAMBA_TEST_DEVICE>();
    check_workspace<Transformer, bf16, ZAMBA_TEST_DEVICE>();
    check_workspace<NestedTransformer, bf16, ZAMBA_TEST_DEVICE>();
  }
  TEST_CASE("it is known before it is taken: other types") {
    check_workspace<TwoAdapted, float, ZAMBA_TEST_DEVICE>();
    check_workspace<Hybrid2, double, ZAMBA_TEST_DEVICE>();
  }

  TEST_CASE("a state that does not fit is refused with what was wanted, and a smaller one is had") {
#ifndef ZAMBA_TEST_SANITIZED  // which end the program where memory does not suffice
    const auto model = random_model<Hybrid, float, ZAMBA_TEST_DEVICE>();
    const StateOptions options{2, Index{1} << 42};
    std::string message;
    try {
      model.new_state(options);
    } catch (const OutOfMemory& error) {
      message = error.what();
    }
    CAPTURE(message);
    const std::size_t workspace = decltype(model)::workspace_bytes(options),
                      state = static_cast<std::size_t>(state_bytes<Hybrid, float>(2, Index{1} << 42));
    const auto says = [&](const std::string& part) { return message.find(part) != std::string::npos; };
    CHECK(message.starts_with("zamba: new_state: out of memory on "));
    CHECK(says(" + state " + std::to_string(state) + " + workspace " + std::to_string(workspace) + "; "));
    auto smaller = model.new_state({2, 8});
    CHECK_NOTHROW(model.extend(smaller, {random_tokens(4), std::vector<Index>{1, 3}}));
#endif
  }
}

}  // namespace
