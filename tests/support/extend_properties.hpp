// SPDX-License-Identifier: MIT
// What extend() promises, and what networks do with their weights, checked for a storage type and a device.
#pragma once

#include <algorithm>
#include <type_traits>

#include <doctest/doctest.h>

#include <zamba/testing/sanitized.hpp>

#include "devices.hpp"
#include "nets.hpp"

namespace zamba_test {

/// By norm, for the same sums in another order. A logit passes through some ten products of up to 50 terms: a few
/// hundred roundings, of 1.1e-16 or 6e-8. A cache of bf16 rounds the last bit of a float to 2^-9 now and then; on CUDA
/// activations are rounded so, too, some forty times on the way to a logit.
template <class T, class Device = cpu>
inline constexpr double rounding = std::is_same_v<T, double>     ? 1e-13
                                   : std::is_same_v<T, float>    ? 2e-5
                                   : std::is_same_v<Device, cpu> ? 0x1p-9
                                                                 : 40 * 0x1p-9;

inline std::vector<Token> part(const std::vector<Token>& tokens, Index first, Index count) {
  return {tokens.begin() + first, tokens.begin() + first + count};
}

/// To be called from a TEST_CASE of its own.
template <class Net, class T, class Device = cpu>
void check_extend(double bound = rounding<T, Device>) {
  SUBCASE("every split of a sequence gives the same logits and state") {
    const auto model = random_model<Net, T, Device>();
    const std::vector<Token> tokens = random_tokens(8);
    auto whole = model.new_state({.max_length = 8});
    poison(whole);
    const auto wanted = values<Device>(model.extend(whole, tokens, Positions::all));
    const auto wanted_state = values(whole);
    double worst = 0, worst_state = 0;
    const auto every = testing::unless_sanitized(1u, 7u);
    for (unsigned cuts = 0; cuts < 1u << 7; cuts += every) {  // bit i: a cut after token i
      auto state = model.new_state({.max_length = 8});
      std::vector<double> logits;
      for (Index first = 0, last = 0; last < 8; ++last) {
        if (last < 7 && !(cuts >> last & 1)) continue;
        poison(state);
        append(logits, values<Device>(model.extend(state, part(tokens, first, last + 1 - first), Positions::all)));
        first = last + 1;
      }
      worst = std::max(worst, relative_error(logits, wanted));
      worst_state = std::max(worst_state, relative_error(values(state), wanted_state));
      REQUIRE_FALSE(std::isnan(relative_error(logits, wanted)));
    }
    CHECK(worst <= bound);
    CHECK(worst_state <= bound);
  }

  SUBCASE("a prompt longer than what is computed at once, ragged, with an empty row") {
    const auto model = random_model<Net, T, Device>();
    const Index chunk = DeviceTraits<Device>::prefill_chunk;
    const std::vector<Index> lengths{chunk - 3, 0, chunk + 5, 2};
    const std::vector<Token> tokens = random_tokens(2 * chunk + 4);
    auto state = model.new_state({.batch = 4, .max_length = chunk + 10});
    poison(state);
    const auto all = values<Device>(model.extend(state, {tokens, lengths}, Positions::all));
    auto other = model.new_state({.batch = 4, .max_length = chunk + 10});
    const auto last = values<Device>(model.extend(other, {tokens, lengths}));
    CHECK(values(state) == values(other));
    for (Index row = 0, first = 0; row < 4; first += lengths[row++]) {
      CAPTURE(row);
      const auto of_row = std::vector<double>(last.begin() + row * vocabulary, last.begin() + (row + 1) * vocabulary);
      CHECK(state.length(row) == lengths[row]);
      if (lengths[row] == 0) {
        for (const double logit : of_row) CHECK(std::isnan(logit));
        continue;
      }
      const auto at = all.begin() + (first + lengths[row] - 1) * vocabulary;
      CHECK(relative_error(of_row, std::vector<double>(at, at + vocabulary)) <= bound);
      // The same row alone, a hundred tokens at a time.
      auto alone = model.new_state({.max_length = chunk + 5});
      std::vector<double> logits;
      for (Index done = 0; done < lengths[row]; done += 100)
        logits =
            values<Device>(model.extend(alone, part(tokens, first + done, std::min<Index>(100, lengths[row] - done))));
      CHECK(relative_error(of_row, logits) <= bound);
      auto gathered = state.gather(std::vector<Index>{row});
      CHECK(relative_error(values(gathered), values(alone)) <= bound);
    }
  }

  SUBCASE("rows continue by themselves in a ragged batch") {
    const auto model = random_model<Net, T, Device>();
    const std::vector<std::vector<Index>> steps{{3, 0, 5}, {0, 4, 1}, {1, 1, 0}, {7, 1, 1}};
    auto together = model.new_state({.batch = 3, .max_length = 16});
    std::vector<decltype(together)> alone;
    for (int row = 0; row < 3; ++row) alone.push_back(model.new_state({.max_length = 16}));
    double worst = 0;
    for (std::size_t step = 0; step < steps.size(); ++step) {
      const auto& lengths = steps[step];
      const auto tokens = random_tokens(lengths[0] + lengths[1] + lengths[2], step);
      poison(together);
      const auto logits = values<Device>(model.extend(together, {tokens, lengths}));
      Index first = 0;
      for (Index row = 0; row < 3; ++row) {
        if (lengths[row] > 0) {
          const auto wanted = values<Device>(model.extend(alone[row], part(tokens, first, lengths[row])));
          const auto at = logits.begin() + row * vocabulary;
          const double error = relative_error(std::vector<double>(at, at + vocabulary), wanted);
          REQUIRE_FALSE(std::isnan(error));
          worst = std::max(worst, error);
        }
        first += lengths[row];
      }
    }
    CHECK(worst <= bound);
  }

  SUBCASE("a token changes nothing before it, bit by bit, and everything after it") {
    const auto model = random_model<Net, T, Device>();
    auto tokens = random_tokens(40);
    const auto logits = [&] {
      auto state = model.new_state({.max_length = 40});
      return values<Device>(model.extend(state, tokens, Positions::all));
    };
    const auto before = logits();
    for (const Index at : {0, 1, 17, 39}) {
      tokens[at] = (tokens[at] + 1) % vocabulary;
      const auto after = logits();
      tokens[at] = (tokens[at] + vocabulary - 1) % vocabulary;
      for (Index i = 0; i < 40; ++i) {
        const auto a = before.begin() + i * vocabulary, b = after.begin() + i * vocabulary;
        CHECK(std::equal(a, a + vocabulary, b) == (i < at));
      }
    }
  }

  SUBCASE("a rerun is bit-equal, on one thread and on two") {
    const auto model = random_model<Net, T, Device>();
    const auto tokens = random_tokens(70);
    const auto run = [&](int threads) {
      auto ctx = zamba::testing::new_context<Device>(threads);
      auto state = model.new_state({.max_length = 72});
      auto logits = values<Device>(model.extend(ctx, state, tokens, Positions::all));
      for (Token token : {3, 4}) append(logits, values<Device>(model.extend(ctx, state, token)));
      append(logits, values(state));
      return logits;
    };
    const auto one = run(1), two = run(2);
    CHECK(run(1) == one);
    CHECK(run(2) == two);
    CHECK(one == two);  // every operator promises the same bits for any number of threads
  }

  SUBCASE("what scratch memory holds changes nothing, bit by bit") {
    const auto model = random_model<Net, T, Device>();
    const Index chunk = DeviceTraits<Device>::prefill_chunk;
    auto ctx = zamba::testing::new_context<Device>(2);
    const auto run = [&](const std::vector<Index>& lengths) {
      auto state = model.new_state({.batch = 2, .max_length = chunk + 10});
      poison(state);
      auto logits = values<Device>(model.extend(ctx, state, {random_tokens(lengths[0] + lengths[1]), lengths}));
      for (int i = 0; i < 3; ++i)  // the third may repeat what was recorded of the second
        append(logits, values<Device>(model.extend(ctx, state, {random_tokens(2, i), std::vector<Index>{1, 1}})));
      append(logits, values(state));
      return logits;
    };
    for (const std::vector<Index>& lengths : {std::vector<Index>{chunk + 5, 3}, {9, 2}}) {
      const auto before = run(lengths);
      poison(ctx.arena());
      CHECK(run(lengths) == before);
    }
  }
}

/// A head of its own, with the embedding's numbers, computes what a tied head does.
template <class T, class Device = cpu>
void check_own_head() {
  using Tied = LanguageModel<vocabulary, Transformer::Stack>;
  auto own = random_model<Transformer, T, Device>();
  const auto tied = random_model<Tied, T, Device>();
  for (std::size_t i = 0; i < tied.entries().size(); ++i) own.write(own.entries()[i], tied.read(tied.entries()[i]));
  REQUIRE(own.entries().back().name == "head.weight");
  own.write(own.entries().back(), tied.read(tied.entries().front()));
  auto state = own.new_state({.max_length = 9});
  auto state_of_tied = tied.new_state({.max_length = 9});
  CHECK(values<Device>(own.extend(state, random_tokens(9))) ==
        values<Device>(tied.extend(state_of_tied, random_tokens(9))));
}

/// Without any one of the adapters the logits are others: each use meets its own.
template <class T, class Device = cpu>
void check_adapters() {
  auto model = random_model<TwoAdapted, T, Device>();
  const auto logits = [&] {
    auto state = model.new_state({.max_length = 4});
    return values<Device>(model.extend(state, {1, 2, 3, 4}));
  };
  const auto before = logits();
  std::vector<std::vector<double>> all{before};
  for (const ParameterEntry& entry : model.entries()) {
    if (entry.name.find("_adapter.b.") == std::string::npos) continue;
    const auto kept = model.read(entry);
    model.write(entry, std::vector<double>(kept.size()));
    all.push_back(logits());
    model.write(entry, kept);
  }
  CHECK(all.size() == 1 + 3 * 4);
  std::sort(all.begin(), all.end());
  CHECK(std::adjacent_find(all.begin(), all.end()) == all.end());
  CHECK(logits() == before);
}

}  // namespace zamba_test
