// SPDX-License-Identifier: MIT
#include <zamba/model.hpp>

#include <limits>

#include <doctest/doctest.h>

#include "support/extend_properties.hpp"

using namespace zamba_test;

TEST_SUITE("model") {
  TEST_CASE("extend: a hybrid in double") { check_extend<Hybrid, double>(); }
  TEST_CASE("extend: two shared blocks, the first layer hybrid, in float") { check_extend<TwoCopies, float>(); }

  TEST_CASE("parameters are listed, read and written by name") {
    Model<Hybrid, float> model(Seed{1});
    Index size = 0;
    for (const ParameterEntry& entry : model.entries()) {
      size += entry.size;
      CHECK(entry.offset % 32 == 0);
      CHECK(entry.byte_offset % alignment == 0);
      Index product = 1;
      for (const Index extent : entry.shape) product *= extent;
      CHECK(product == entry.size);
    }
    CHECK(size == parameter_count<Hybrid>);
    CHECK(model.entries().front().name == "embedding.weight");
    CHECK(model.entries().back().name == "final_norm.weight");
    const ParameterEntry entry = model.entries()[3];
    std::vector<double> values(static_cast<std::size_t>(entry.size));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i) / 8;
    model.write(entry, values);
    CHECK(model.read(entry) == values);
    CHECK_THROWS_WITH_AS(model.write(entry, std::vector<double>(3)),
                         doctest::Contains(("zamba: Model::write: " + entry.name + " has ").c_str()), Error);
    const auto same = Model<Hybrid, float>(Seed{1}), other = Model<Hybrid, float>(Seed{2});
    CHECK(same.read(same.entries()[0]) == model.read(model.entries()[0]));
    CHECK(other.read(other.entries()[0]) != model.read(model.entries()[0]));
  }

  TEST_CASE("wrong input to extend is refused by name and leaves the state as it was") {
    const auto model = random_model<Hybrid, double>();
    auto state = model.new_state({.batch = 2, .max_length = 6});
    model.extend(state, {random_tokens(5), std::vector<Index>{3, 2}});
    const auto before = state.to_bytes();
    const auto refused = [&](const Tokens& tokens, const char* message) {
      CHECK_THROWS_WITH_AS(model.extend(state, tokens), message, Error);
      CHECK(state.to_bytes() == before);
    };
    using Lengths = std::vector<Index>;
    using Ids = std::vector<Token>;
    refused(Ids{}, "zamba: extend: the prompt is empty, at least one token is needed");
    refused({Ids{}, Lengths{0, 0}}, "zamba: extend: the prompt is empty, at least one token is needed");
    refused(Ids{1}, "zamba: extend: a state of 2 rows needs the number of tokens of each row");
    refused({Ids{1, 2}, Lengths{2}}, "zamba: extend: 1 lengths given for a state of 2 rows");
    refused({Ids{1, 2}, Lengths{1, 0, 1}}, "zamba: extend: 3 lengths given for a state of 2 rows");
    refused({Ids{1, 2}, Lengths{1, 0}}, "zamba: extend: the lengths add up to 1, but 2 tokens were given");
    refused({Ids{1, 2}, Lengths{2, 2}}, "zamba: extend: the lengths add up to 4, but 2 tokens were given");
    refused({Ids{1, 2}, Lengths{3, -1}}, "zamba: extend: row 0 has length 3, with 2 tokens given");
    refused({Ids{1, 2}, Lengths{-1, 3}}, "zamba: extend: row 0 has length -1, with 2 tokens given");
    const Index huge = std::numeric_limits<Index>::max();
    refused({Ids{1, 2}, Lengths{huge, huge}},
            "zamba: extend: row 0 has length 9223372036854775807, with 2 tokens given");
    refused({Ids{1, 2, 3, 4}, Lengths{4, 0}},
            "zamba: extend: row 0 holds 3 positions and would get 4 more, over max_length 6");
    refused({Ids{1, 29}, Lengths{1, 1}}, "zamba: extend: token 29 at position 1 is outside the vocabulary of 29");
    refused({Ids{-1, 2}, Lengths{1, 1}}, "zamba: extend: token -1 at position 0 is outside the vocabulary of 29");
    // What just fits is taken.
    CHECK_NOTHROW(model.extend(state, {Ids{1, 2, 28, 0, 0, 0, 0}, Lengths{3, 4}}));
    CHECK(state.length(0) == 6);
    CHECK(state.length(1) == 6);
  }
}
