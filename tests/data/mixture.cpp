// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <doctest/doctest.h>
#include <tests/support/temporary_folder.hpp>
#include <zamba/data/mixture.hpp>

namespace {

using zamba::Index;
using zamba::Mixture;
using zamba::PackedBatch;
using zamba::Seed;
using zamba::Token;
using zamba::TokenFile;
using zamba::TokenRange;
using zamba::TokenWidth;

TokenFile file_of(const zamba_test::TemporaryFolder& folder, const char* name, const std::vector<Token>& tokens,
                  std::optional<Token> end = std::nullopt) {
  zamba::write_token_file(folder.path / name, tokens, TokenWidth::u16);
  return TokenFile::open(folder.path / name, TokenWidth::u16, end);
}

/// first, first + 1, ...: a token tells its own position.
std::vector<Token> counting(Token first, Index count) {
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = first + static_cast<Token>(i);
  return tokens;
}

}  // namespace

TEST_SUITE("data/mixture") {
  TEST_CASE("packing, by hand") {
    const zamba_test::TemporaryFolder folder;
    //                                            0  1  2  3  4  5  6  7  8  9
    const TokenFile file = file_of(folder, "a", {5, 6, 0, 7, 8, 9, 0, 0, 4, 3}, 0);
    PackedBatch batch;
    batch.clear(20);
    batch.append(file, 1, 6);  // ends on a document end: no empty sequence follows
    CHECK(batch.tokens == std::vector<Token>{6, 0, 7, 8, 9, 0});
    CHECK(batch.targets == std::vector<Token>{0, -1, 8, 9, 0, -1});
    CHECK(batch.offsets == std::vector<Index>{0, 2, 6});
    CHECK(batch.longest == 4);
    batch.append(file, 5, 4);  // a document of one token: the end alone
    CHECK(batch.tokens == std::vector<Token>{6, 0, 7, 8, 9, 0, 9, 0, 0, 4});
    CHECK(batch.targets == std::vector<Token>{0, -1, 8, 9, 0, -1, 0, -1, -1, 3});
    CHECK(batch.offsets == std::vector<Index>{0, 2, 6, 8, 9, 10});
    const zamba::Sequences sequences = batch.sequences();
    CHECK(sequences.rows == 5);
    CHECK(sequences.tokens == 10);
    CHECK(sequences.longest == 4);
    CHECK(sequences.offsets == batch.offsets.data());
    CHECK(sequences.start(3) == 0);
  }

  TEST_CASE("rows are windows of the ranges; targets follow; without document ends a row is a sequence") {
    const zamba_test::TemporaryFolder folder;
    const TokenFile file = file_of(folder, "a", counting(0, 1000));
    const Mixture mixture({{{&file, 100, 200}, 1, "a"}});
    PackedBatch batch;
    std::vector<int> starts(1000, 0);
    for (Index step = 0; step < 500; ++step) {
      mixture.draw(Seed{1}, step, 0, 4, 90, batch);
      REQUIRE(batch.tokens.size() == 360);
      REQUIRE(batch.offsets == std::vector<Index>{0, 90, 180, 270, 360});
      REQUIRE(batch.longest == 90);
      for (std::size_t i = 0; i < 360; ++i) {
        REQUIRE(batch.targets[i] == batch.tokens[i] + 1);
        REQUIRE(batch.tokens[i] == batch.tokens[i - i % 90] + static_cast<Token>(i % 90));
        REQUIRE(batch.targets[i] < 200);
      }
      for (std::size_t row = 0; row < 4; ++row) ++starts[static_cast<std::size_t>(batch.tokens[row * 90])];
    }
    // Ten starts, 100 to 109, for 2000 rows. 27.88 is the upper 0.1 % point of chi-square with 9 degrees of freedom.
    double statistic = 0;
    for (std::size_t i = 0; i < 1000; ++i) {
      if (i < 100 || i > 109) CHECK(starts[i] == 0);
      if (i >= 100 && i <= 109) statistic += std::pow(starts[i] - 200, 2) / 200.;
    }
    CHECK(statistic < 27.88);
    // A range with room for one window only.
    Mixture({{{&file, 100, 191}, 1, "a"}}).draw(Seed{1}, 0, 0, 2, 90, batch);
    CHECK(batch.tokens[0] == 100);
    CHECK(batch.tokens[90] == 100);
    CHECK(batch.targets[89] == 190);
  }

  TEST_CASE("sources come by weight") {
    const zamba_test::TemporaryFolder folder;
    const TokenFile a = file_of(folder, "a", std::vector<Token>(50, 1)),
                    b = file_of(folder, "b", std::vector<Token>(60, 2)),
                    c = file_of(folder, "c", std::vector<Token>(70, 3));
    const Mixture mixture({{TokenRange::whole(a), 3, "replay"},
                           {TokenRange::whole(b), 1.5, "instruct"},
                           {TokenRange::whole(c), 0.5, "code"}});
    CHECK(mixture.str() == "replay 3 [0, 50), instruct 1.5 [0, 60), code 0.5 [0, 70)");
    PackedBatch batch;
    Index counts[4] = {};
    for (Index step = 0; step < 2500; ++step) {
      mixture.draw(Seed{2}, step, 0, 8, 2, batch);
      for (std::size_t row = 0; row < 8; ++row) ++counts[batch.tokens[2 * row]];
    }
    const double n = 20000, shares[4] = {0, 0.6, 0.3, 0.1};
    double statistic = 0;
    for (int i = 1; i < 4; ++i)
      statistic += std::pow(static_cast<double>(counts[i]) - n * shares[i], 2) / (n * shares[i]);
    CHECK(statistic < 13.82);  // upper 0.1 % point with 2 degrees of freedom
  }

  TEST_CASE("a batch depends on seed, step and micro-batch alone, and allocates nothing when used again") {
    const zamba_test::TemporaryFolder folder;
    std::vector<Token> tokens = counting(1, 5000);
    for (std::size_t i = 0; i < tokens.size(); i += 7) tokens[i] = 0;
    const TokenFile file = file_of(folder, "a", tokens, 0);
    const Mixture mixture({{{&file, 0, 3000}, 0.6, "a"}, {{&file, 3000, 5000}, 0.4, "b"}});
    const auto draw = [&](std::uint64_t seed, Index step, Index micro) {
      PackedBatch batch;
      mixture.draw(Seed{seed}, step, micro, 4, 64, batch);
      return batch.tokens;
    };
    PackedBatch batch;
    mixture.draw(Seed{3}, 0, 0, 4, 64, batch);
    const auto *tokens_at = batch.tokens.data(), *targets_at = batch.targets.data();
    const auto* offsets_at = batch.offsets.data();
    for (const Index step : std::vector<Index>{17, 3, 17, 1'000'000'000'000}) {
      mixture.draw(Seed{3}, step, 2, 4, 64, batch);
      CHECK(batch.tokens == draw(3, step, 2));
    }
    CHECK(batch.tokens.data() == tokens_at);
    CHECK(batch.targets.data() == targets_at);
    CHECK(batch.offsets.data() == offsets_at);
    CHECK(draw(3, 5, 0) != draw(3, 6, 0));
    CHECK(draw(3, 5, 0) != draw(3, 5, 1));
    CHECK(draw(3, 5, 0) != draw(4, 5, 0));
    CHECK(draw(3, 0, 1) != draw(3, 1, 0));
  }

  TEST_CASE("held-out windows cover a range once") {
    const zamba_test::TemporaryFolder folder;
    const TokenFile file = file_of(folder, "a", counting(0, 100));
    for (const Index size : {2, 3, 10, 11, 12, 30}) {
      for (const Index rows : {1, 2, 5}) {
        const TokenRange range{&file, 20, 20 + size};
        std::vector<Token> inputs, targets;
        PackedBatch batch;
        const Index count = zamba::window_count(range, 5);
        for (Index window = 0; window < count; window += rows) {
          zamba::read_windows(range, 5, window, rows, batch);
          inputs.insert(inputs.end(), batch.tokens.begin(), batch.tokens.end());
          targets.insert(targets.end(), batch.targets.begin(), batch.targets.end());
          for (std::size_t i = 1; i + 1 < batch.offsets.size(); ++i)
            CHECK(batch.offsets[i] == static_cast<Index>(5 * i));
        }
        CHECK(inputs == counting(20, size - 1));
        CHECK(targets == counting(21, size - 1));
      }
    }
    CHECK(zamba::window_count({&file, 20, 21}, 5) == 0);
    CHECK(zamba::window_count({&file, 20, 20}, 5) == 0);
    PackedBatch batch;
    CHECK_THROWS_WITH(zamba::read_windows({&file, 0, 11}, 5, 2, 1, batch),
                      "zamba: read_windows: 1 windows from 2 wanted of 2");
    CHECK_THROWS_AS(zamba::window_count({&file, 0, 11}, 0), zamba::Error);
  }

  TEST_CASE("nonsense is refused") {
    const zamba_test::TemporaryFolder folder;
    const TokenFile file = file_of(folder, "a", counting(0, 10));
    CHECK_THROWS_WITH(Mixture({}), "zamba: Mixture: there is no source");
    CHECK_THROWS_WITH(Mixture({{TokenRange::whole(file), 0, "text"}}),
                      "zamba: Mixture: the weight of 'text' must be above 0, got 0; leave a source of weight 0 out");
    for (const double weight : {std::nan(""), HUGE_VAL, -1.})
      CHECK_THROWS_AS(Mixture({{TokenRange::whole(file), weight, "text"}}), zamba::Error);
    const auto two = [&](double a, double b) {
      return Mixture({{TokenRange::whole(file), a, "a"}, {TokenRange::whole(file), b, "b"}});
    };
    CHECK_THROWS_AS(two(0, 0), zamba::Error);
    CHECK_THROWS_WITH(two(1.7e308, 1.7e308), "zamba: Mixture: the weights add up to inf");
    CHECK_THROWS_WITH(
        two(1, 1e-20),
        "zamba: Mixture: the weight of 'b', 1e-20 of 1 in all, is too small for anything to be drawn from "
        "it");
    CHECK_THROWS_AS(two(1e-20, 1), zamba::Error);
    CHECK_NOTHROW(two(1, 1e-12));
    CHECK_THROWS_AS(Mixture({{{&file, 5, 11}, 1, "text"}}), zamba::Error);
    const Mixture mixture({{TokenRange::whole(file), 1, "text"}});
    PackedBatch batch;
    CHECK_NOTHROW(mixture.draw(Seed{1}, 0, 0, 1, 9, batch));
    CHECK_THROWS_WITH(mixture.draw(Seed{1}, 0, 0, 1, 10, batch),
                      "zamba: Mixture: 'text' has 10 tokens; rows of 10 need 11");
    CHECK_THROWS_AS(mixture.draw(Seed{1}, 0, 0, 0, 5, batch), zamba::Error);
    CHECK_THROWS_AS(mixture.draw(Seed{1}, 0, 0, 1, 0, batch), zamba::Error);
    CHECK_THROWS_AS(mixture.draw(Seed{1}, -1, 0, 1, 5, batch), zamba::Error);
    for (const Index rows : {Index{1} << 61, Index{1} << 62, Index{1} << 31})  // times 8: over 2^63, or over memory
      CHECK_THROWS_AS(mixture.draw(Seed{1}, 0, 0, rows, 8, batch), zamba::Error);
    // Windows longer than any text, and more of them than there are, are as long and as many as there is text.
    zamba::read_windows(TokenRange::whole(file), INT64_MAX, 0, INT64_MAX, batch);
    CHECK(batch.tokens == counting(0, 9));
    zamba::read_windows(TokenRange::whole(file), 4, 1, INT64_MAX, batch);
    CHECK(batch.tokens == counting(4, 5));
  }
}
