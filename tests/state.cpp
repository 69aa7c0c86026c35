// SPDX-License-Identifier: MIT
#include <zamba/state.hpp>

#include <doctest/doctest.h>

#include "support/devices.hpp"
#include "support/nets.hpp"

namespace {

using namespace zamba_test;

using Net = Hybrid;
using TestState = State<Net, float, TestDevice>;
using Bytes = std::vector<std::byte>;

const Model<Net, float, TestDevice>& hybrid() {
  static const auto model = random_model<Net, float, TestDevice>();
  return model;
}

/// Rows of 5, 0 and 9 positions.
TestState example() {
  auto state = hybrid().new_state({.batch = 3, .max_length = 16});
  hybrid().extend(state, {random_tokens(14), std::vector<Index>{5, 0, 9}});
  return state;
}

/// What every row says to one more token.
std::vector<double> next(TestState state) {
  const std::vector<Index> lengths(static_cast<std::size_t>(state.batch()), 1);
  return values<TestDevice>(hybrid().extend(state, {random_tokens(state.batch(), 9), lengths}));
}

/// A state that goes through steps which change the weights.
template <class Device>
void check_carried_state() {
  auto model = random_model<Net, float, Device>();
  const auto other = random_model<Net, float, Device>({6});
  auto& ctx = this_thread_context<Device>();
  const std::vector<Token> tokens = random_tokens(12, 2);
  const std::vector<Index> offsets{0, 5, 12};
  const TrainingBatch batch{tokens, tokens, offsets};
  auto gradients = model.new_gradients();
  auto state = model.new_state({.batch = 2, .max_length = 64});
  const auto step = [&](auto& continued) {
    model.loss_and_gradients(ctx, batch, gradients, {.state = &continued});
    auto values = model.read(model.entries()[1]);
    for (double& value : values) value *= 0.99;
    model.write(model.entries()[1], values);
  };
  for (int i = 0; i < 3; ++i) step(state);
  CHECK(state.length(1) == 21);
  // What went before the last step is not what these weights say; to a loss it is an input like another.
  const auto refused = doctest::Contains("extend: the state was computed with other weights");
  CHECK_THROWS_WITH_AS(model.extend(state, {random_tokens(2), std::vector<Index>{1, 1}}), refused, Error);
  auto judged = state, others = state, read = State<Net, float, Device>::from_bytes(state.to_bytes());
  CHECK_NOTHROW(model.loss(batch, &judged));
  CHECK_NOTHROW(other.loss(batch, &others));
  CHECK_NOTHROW(step(read));
  CHECK_NOTHROW(other.extend(others, {random_tokens(2), std::vector<Index>{1, 1}}));
  CHECK_THROWS_WITH_AS(model.extend(others, {random_tokens(2), std::vector<Index>{1, 1}}), refused, Error);
  CHECK_THROWS_WITH_AS(model.loss_and_gradients(ctx, batch, gradients, {.state = &read, .d_state = &read}),
                       "zamba: loss: the gradients of a state are the state itself", Error);
}

}  // namespace

TEST_SUITE("state") {
  TEST_CASE("sizes are those of the constants") {
    const TestState state({.batch = 3, .max_length = 16});
    const Index bytes = state_bytes<Net, float>(3, 16);
    CHECK(static_cast<Index>(state.bytes()) >= bytes);  // each tensor is padded to a cache line
    CHECK(static_cast<Index>(state.bytes()) < bytes + 12 * 64);
    CHECK_THROWS_WITH_AS(TestState({.batch = 0}),
                         "zamba: new_state: batch and max_length must be positive, got batch 0 and max_length 2048",
                         Error);
    CHECK_THROWS_WITH_AS(TestState({.max_length = -1}),
                         "zamba: new_state: batch and max_length must be positive, got batch 1 and max_length -1",
                         Error);
    const Index huge = Index{1} << 62;
    CHECK_THROWS_WITH_AS(TestState({.batch = 2, .max_length = huge}),
                         "zamba: new_state: batch 2 and max_length 4611686018427387904 would need more memory than can "
                         "be addressed",
                         Error);
    CHECK_THROWS_WITH_AS(state.length(3), "zamba: State: row 3 of a batch of 3", Error);
    CHECK_THROWS_WITH_AS(state.length(-1), "zamba: State: row -1 of a batch of 3", Error);
  }

  TEST_CASE("a copy goes its own way") {
    auto state = example();
    const auto bytes = state.to_bytes();
    TestState copy = state;
    CHECK(copy.to_bytes() == bytes);
    hybrid().extend(copy, {random_tokens(3, 1), std::vector<Index>{1, 1, 1}});
    CHECK(state.to_bytes() == bytes);
    CHECK(copy.to_bytes() != bytes);
    CHECK(next(state) == next(example()));
    copy = state;
    CHECK(copy.to_bytes() == bytes);
    copy = *&copy;
    CHECK(copy.to_bytes() == bytes);
    TestState moved = std::move(copy);
    CHECK(moved.to_bytes() == bytes);
    CHECK(next(moved) == next(state));
  }

  TEST_CASE("reset forgets all rows, or one") {
    auto state = example();
    state.reset(0);
    CHECK(std::vector<Index>(state.lengths().begin(), state.lengths().end()) == std::vector<Index>{0, 0, 9});
    poison(state);  // nothing of the forgotten row may be read again
    auto logits = next(state);
    CHECK_FALSE(std::isnan(relative_error(logits, logits)));
    const auto before = next(example());
    CHECK(std::equal(logits.begin() + vocabulary, logits.end(), before.begin() + vocabulary));
    CHECK_FALSE(std::equal(logits.begin(), logits.begin() + vocabulary, before.begin()));
    state.reset();
    poison(state);
    CHECK(next(state) == next(hybrid().new_state({.batch = 3, .max_length = 16})));
  }

  TEST_CASE("gather takes rows in any order, as often as asked") {
    const auto state = example();
    const auto chosen = state.gather(std::vector<Index>{2, 0, 2, 1});
    CHECK(std::vector<Index>(chosen.lengths().begin(), chosen.lengths().end()) == std::vector<Index>{9, 5, 9, 0});
    CHECK(chosen.max_length() == 16);
    const auto back = chosen.gather(std::vector<Index>{1, 3, 0});
    CHECK(back.to_bytes() == state.to_bytes());
    CHECK(next(back) == next(state));
    CHECK_THROWS_WITH_AS(state.gather(std::vector<Index>{3}), "zamba: State: row 3 of a batch of 3", Error);
  }

  TEST_CASE("roll_back returns to a snapshot, as often as asked") {
    auto state = example();
    const auto before = next(state);
    const auto bytes = state.to_bytes();
    const auto snapshot = state.snapshot();
    for (std::uint64_t trial = 0; trial < 3; ++trial) {
      hybrid().extend(state, {random_tokens(6, 20 + trial), std::vector<Index>{1, 3, 2}});
      CHECK(next(state) != before);
      state.roll_back(snapshot);
      CHECK(state.to_bytes() == bytes);
      CHECK(next(state) == before);
    }
  }

  TEST_CASE("a snapshot that the state has left is refused") {
    auto state = example();
    const auto snapshot = state.snapshot();
    state.reset(2);
    CHECK_THROWS_WITH_AS(state.roll_back(snapshot),
                         "zamba: roll_back: row 2 no longer begins with the 9 tokens of the snapshot", Error);
    hybrid().extend(state, {random_tokens(9, 4), std::vector<Index>{0, 0, 9}});
    const auto other = state.to_bytes();
    CHECK_THROWS_WITH_AS(state.roll_back(snapshot),
                         "zamba: roll_back: row 2 no longer begins with the 9 tokens of the snapshot", Error);
    CHECK(state.to_bytes() == other);
    auto narrow = hybrid().new_state({.batch = 1, .max_length = 16});
    CHECK_THROWS_WITH_AS(narrow.roll_back(snapshot), "zamba: roll_back: the snapshot holds 3 rows, the state 1", Error);
  }

  TEST_CASE("bytes give the state back") {
    const auto state = example();
    const Bytes bytes = state.to_bytes();
    const auto back = TestState::from_bytes(bytes);
    CHECK(back.batch() == 3);
    CHECK(back.max_length() == 16);
    CHECK(back.to_bytes() == bytes);
    CHECK(next(back) == next(state));
    auto continued = back;
    CHECK_NOTHROW(continued.roll_back(state.snapshot()));
  }

  TEST_CASE("bytes of another architecture, another type, or cut short are refused") {
    const Bytes bytes = example().to_bytes();
    using Other = State<Plain, float, TestDevice>;
    CHECK_THROWS_WITH_AS(Other::from_bytes(bytes),
                         doctest::Contains("zamba: State::from_bytes: the state belongs to an architecture of hash "),
                         Error);
    using Narrow = State<Net, bf16, TestDevice>;
    CHECK_THROWS_WITH_AS(Narrow::from_bytes(bytes),
                         "zamba: State::from_bytes: the caches hold elements of 4 bytes, this state's of 2", Error);
    for (std::size_t size = 0; size < bytes.size(); size += size < 200 ? 1 : 101)
      CHECK_THROWS_AS(TestState::from_bytes(std::span(bytes).first(size)), Error);
    Bytes longer = bytes;
    longer.resize(bytes.size() + 3);
    CHECK_THROWS_WITH_AS(TestState::from_bytes(longer), "zamba: State::from_bytes: 3 bytes left over", Error);
    CHECK_THROWS_WITH_AS(TestState::from_bytes(Bytes(1000)),
                         "zamba: State::from_bytes: these are not the bytes of a state", Error);
  }

  TEST_CASE("damaged bytes are refused or give other numbers; no size is believed unseen") {
    const Bytes bytes = example().to_bytes();
    Random random(Seed{31});
    int refused = 0;
    for (int trial = 0; trial < 4000; ++trial) {
      Bytes damaged = bytes;
      const std::size_t within = trial % 2 ? bytes.size() : 100;  // half of them in the header and the lengths
      for (Index i = 0; i <= trial % 3; ++i)
        damaged[static_cast<std::size_t>(random.below(static_cast<Index>(within)))] = std::byte(random.bits());
      if (trial % 7 == 0) damaged.resize(static_cast<std::size_t>(random.below(static_cast<Index>(bytes.size()))));
      try {
        const auto state = TestState::from_bytes(damaged);
        CHECK(state.max_length() == 16);
        CHECK(state.batch() == 3);
      } catch (const Error&) {
        ++refused;
      }
    }
    CHECK(refused > 1500);
    CHECK(refused < 4000);
  }

  TEST_CASE("a state that other weights computed is refused, in memory and from bytes") {
    const auto other = random_model<Net, float, TestDevice>({6});
    const auto refused = [](auto&& call) {
      try {
        call();
      } catch (const Error& error) {
        return std::string(error.what()).find("the state was computed with other weights") != std::string::npos;
      }
      return false;
    };
    auto state = example();
    const Bytes bytes = state.to_bytes();
    const std::vector<Token> tokens = random_tokens(3, 1);
    const std::vector<Index> one_each{1, 1, 1};
    CHECK(refused([&] { other.extend(state, {tokens, one_each}); }));
    CHECK(refused([&] { other.extend(state, {random_tokens(5), std::vector<Index>{0, 5, 0}}); }));
    CHECK(state.to_bytes() == bytes);
    auto read = TestState::from_bytes(bytes);
    CHECK(refused([&] { other.extend(read, {tokens, one_each}); }));
    CHECK(refused([&] { other.state_from_bytes(bytes); }));
    CHECK(hybrid().state_from_bytes(bytes).to_bytes() == bytes);
    auto copy = state, gathered = state.gather(std::vector<Index>{2, 2, 0});
    copy = read;
    CHECK(refused([&] { other.extend(copy, {tokens, one_each}); }));
    CHECK(refused([&] { other.extend(gathered, {tokens, one_each}); }));
    CHECK_NOTHROW(hybrid().extend(gathered, {tokens, one_each}));

    // Equal weights are the same weights, whichever model has them.
    const auto twin = random_model<Net, float, TestDevice>();
    CHECK(twin.fingerprint() == hybrid().fingerprint());
    CHECK_NOTHROW(twin.extend(read, {tokens, one_each}));
    // What holds no position is anybody's; and whoever insists may go on.
    state.reset();
    CHECK_NOTHROW(other.extend(state, {tokens, one_each}));
    copy.set_fingerprint(other.fingerprint());
    CHECK_NOTHROW(other.extend(copy, {tokens, one_each}));
  }

  TEST_CASE("training carries a state from step to step") {
    if constexpr (trains<TestDevice>) check_carried_state<TestDevice>();
  }

  TEST_CASE("the fingerprint follows every change of the weights, and nothing else") {
    auto model = random_model<Net, float, TestDevice>();
    const auto& entries = model.entries();
    std::vector<std::uint64_t> seen{model.fingerprint()};
    for (const std::size_t i : {std::size_t{0}, entries.size() / 2, entries.size() - 1}) {
      auto values = model.read(entries[i]);
      values.back() += 0.5;
      model.write(entries[i], values);
      CHECK(std::find(seen.begin(), seen.end(), model.fingerprint()) == seen.end());
      seen.push_back(model.fingerprint());
    }
    auto state = model.new_state({.max_length = 8});
    model.extend(state, {1, 2});
    const Bytes bytes = state.to_bytes();
    model.data(entries[0]);  // perhaps nothing is written there
    CHECK_NOTHROW(model.extend(state, {3}));
    auto moved = std::move(model);
    CHECK_NOTHROW(moved.extend(state, {4}));
    CHECK_NOTHROW(moved.state_from_bytes(bytes));
    CHECK((moved.template to<double>().template to<float>().fingerprint()) == seen.back());
    CHECK((moved.template to<bf16>().fingerprint()) != seen.back());
  }

  TEST_CASE("of large parameters a sample is looked at, which a step of all weights changes") {
    using Wide = LanguageModel<3001, UniformStack<1, WideMixer>>;
    Model<Wide, float, TestDevice> model(Seed{3});
    const ParameterEntry entry = model.entries()[0];
    CHECK(model.bytes(entry) > 200'000);
    const auto before = model.fingerprint();
    auto values = model.read(entry);
    for (double& value : values) value *= 1.0001;
    model.write(entry, values);
    CHECK(model.fingerprint() != before);
  }

  TEST_CASE("a snapshot of another architecture, storage type, or of other weights is refused") {
    auto state = example();
    const Bytes bytes = state.to_bytes();
    const std::vector<Index> lengths{5, 0, 9};
    const auto message = [&](const StateSnapshot& snapshot) {
      std::string text;
      try {
        state.roll_back(snapshot);
      } catch (const Error& error) {
        text = error.what();
      }
      CHECK(state.to_bytes() == bytes);
      return text;
    };
    const auto snapshot_of = [&](const auto& model) {
      auto theirs = model.new_state({.batch = 3, .max_length = 16});
      model.extend(theirs, {random_tokens(14), lengths});
      return theirs.snapshot();
    };
    const auto other_type = "zamba: roll_back: the snapshot is of a state of another architecture or storage type";
    CHECK(message(snapshot_of(random_model<Second, float, TestDevice>())) == other_type);
    CHECK(message(snapshot_of(random_model<Plain, float, TestDevice>())) == other_type);
    CHECK(message(snapshot_of(random_model<Net, bf16, TestDevice>())) == other_type);
    CHECK(message(snapshot_of(random_model<Net, float, TestDevice>({6}))) ==
          "zamba: roll_back: the snapshot is of a state that other weights computed");
    auto damaged = state.snapshot();
    damaged.rewritten.resize(damaged.rewritten.size() + 4);
    CHECK(message(damaged).starts_with("zamba: roll_back: the snapshot is damaged"));
    damaged = state.snapshot();
    damaged.history.pop_back();
    CHECK(message(damaged).starts_with("zamba: roll_back: the snapshot is damaged"));
    damaged = state.snapshot();
    damaged.lengths[1] = -1;
    CHECK(message(damaged) == "zamba: roll_back: row 1 no longer begins with the -1 tokens of the snapshot");
    CHECK(message(state.snapshot()).empty());
    CHECK_THROWS_WITH_AS(state.gather({}), "zamba: gather: no rows are named, at least one is needed", Error);
  }

  TEST_CASE("room beyond the rows costs no memory that is touched: a small header cannot ask for it") {
    auto state = hybrid().new_state({.max_length = Index{1} << 24});
    hybrid().extend(state, {1, 2, 3});
    const Bytes bytes = state.to_bytes();
    CHECK(bytes.size() < 20'000);
    CHECK(TestState::from_bytes(bytes).to_bytes() == bytes);
  }

  TEST_CASE("the architecture's hash tells networks apart") {
    CHECK(architecture_hash<Hybrid>() == architecture_hash<Hybrid>());
    CHECK(architecture_hash<Hybrid>() != architecture_hash<Plain>());
    CHECK(architecture_hash<Hybrid>() != architecture_hash<TwoCopies>());
    CHECK(architecture_hash<Hybrid>() != architecture_hash<LanguageModel<30, Hybrid::Stack>>());
  }
}
