// SPDX-License-Identifier: MIT
// Types of weights, activations and caches chosen one by one, and a weight type that is no plain number.
#include <zamba/testing/check_reference.hpp>

#include <cmath>
#include <cstdint>
#include <vector>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>
#include <tests/support/scaled.hpp>

using namespace zamba_test;

namespace {

using Int8 = Scaled<std::int8_t>;
using Int8Types = Types<Int8, float>;

/// Logits of a prompt that takes the way for many tokens, then of single tokens.
template <class ModelType>
std::vector<double> logits_of(const ModelType& model) {
  std::vector<Token> prompt(70);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<Token>((i * 37 + 5) % 96);
  auto state = model.new_state({.max_length = 80});
  std::vector<double> all;
  const auto add = [&](const auto& logits) { all.insert(all.end(), logits.data, logits.data + logits.size()); };
  add(model.extend(state, prompt, Positions::all));
  for (Token token = 0; token < 5; ++token) add(model.extend(state, token));
  return all;
}

template <class To, class T>
std::vector<double> logits_as(const Model<ZambaCase, T>& model) {
  return logits_of(model.template to<To>());
}

/// What rounding to integers moves logits by, relative to their norm. The rounding of a weight is at most half a step,
/// evenly spread, so its root mean square is step / sqrt(12); a product of rows of root mean square w is off by that
/// over w, whatever it multiplies. Errors of the products that a token passes are of random sign: their squares add,
/// and a net in which norms keep every product's share of the stream at most 1 adds no more. Three deviations.
double bound_of_int8(const Model<ZambaCase, float>& model) {
  double sum = 0;
  for (const ParameterEntry& entry : model.entries()) {
    if (entry.precise) continue;
    const std::vector<double> values = model.read(entry);
    double squares = 0, roundings = 0;
    for (Index row = 0; row < entry.size / entry.cols(); ++row) {
      double greatest = 0;
      for (Index k = 0; k < entry.cols(); ++k) {
        const double value = values[static_cast<std::size_t>(row * entry.cols() + k)];
        squares += value * value;
        greatest = std::max(greatest, std::abs(value));
      }
      roundings += static_cast<double>(entry.cols()) * std::pow(greatest / 127, 2) / 12;
    }
    const double uses = entry.name.starts_with("stack.shared") ? static_cast<double>(ZambaCase::Stack::uses) : 1;
    sum += uses * roundings / squares;
  }
  return 3 * std::sqrt(sum);
}

}  // namespace

TEST_SUITE("weight") {
  TEST_CASE("the three types of a model") {
    CHECK(std::is_same_v<activation_t<Types<bf16, float>, cuda>, float>);
    CHECK(std::is_same_v<activation_t<Types<Int8, bf16>, cuda>, bf16>);
    CHECK(std::is_same_v<compute_t<Types<float, double>>, double>);
    CHECK(std::is_same_v<cache_t<Types<float, float, bf16>>, bf16>);
    CHECK(std::is_same_v<weight_t<Types<Int8, float>>, Int8>);
    CHECK(std::is_same_v<weight_t<bf16>, bf16>);
    CHECK(std::is_same_v<Weight<const float>, Matrix<const float>>);
    CHECK(std::is_same_v<Weight<bf16, 3>, Tensor<bf16, 3>>);
  }

  TEST_CASE("bf16 by its name and by its three types is one model") {
    const auto model = load_huggingface<ZambaCase, bf16>(case_path("zamba"));
    CHECK(logits_as<Types<bf16, float, bf16>>(model) == logits_of(model));
  }

  TEST_CASE("weights and caches have types of their own: exact conversions change no bit") {
    const auto model = load_huggingface<ZambaCase, bf16>(case_path("zamba"));
    CHECK(logits_as<Types<float, float, bf16>>(model) == logits_of(model));
    CHECK(logits_as<Types<bf16, float, float>>(model) == logits_as<float>(model));
    CHECK(logits_as<float>(model) != logits_of(model));
    const auto mixed = model.to<Types<float, float, bf16>>();
    CHECK(mixed.new_state().bytes() == model.new_state().bytes());
    CHECK(mixed.bytes(mixed.entries()[0]) == 2 * model.bytes(model.entries()[0]));
  }

  TEST_CASE("float weights with bf16 caches: a reference case, complete") {
    // Without a cache it is a model of float. With one, every key and value is off by up to 2^-9 of itself, in two
    // uses.
    auto bounds = zamba::testing::reference_bounds<float>();
    bounds.logits = bounds.caches = 4 * 0x1p-9;
    const auto report =
        zamba::testing::check_reference<ZambaCase, Types<float, float, bf16>>(case_path("zamba"), bounds);
    MESSAGE(report);
    CHECK(report.passed());
    CHECK(report.lines().size() == 19);
  }

  TEST_CASE("int8 with scales: the numbers that it stands for, bit by bit") {
    const auto model = load_huggingface<ZambaCase, Int8Types>(case_path("zamba"));
    CHECK(logits_of(model) == logits_as<float>(model));
    const ParameterEntry& embedding = model.entries()[0];
    CHECK(model.bytes(embedding) == static_cast<std::size_t>(96 * (32 + 4)));
    CHECK(logits_as<Int8Types>(load_huggingface<ZambaCase, float>(case_path("zamba"))) == logits_of(model));
  }

  TEST_CASE("int8 with scales: a reference case, without training") {
    const double bound = bound_of_int8(load_huggingface<ZambaCase, float>(case_path("zamba")));
    const auto report =
        zamba::testing::check_reference<ZambaCase, Int8Types>(case_path("zamba"), {bound, bound, bound, 0, 0, 0, true});
    MESSAGE(report);
    CHECK(report.passed());
    CHECK(report.lines().size() == 13);
  }

  TEST_CASE("int8 with scales: saved as the floats that it stands for") {
    const TemporaryFolder folder;
    const auto model = load_huggingface<ZambaCase, Int8Types>(case_path("zamba"));
    save_huggingface(model, folder.path / "saved");
    const auto saved = load_huggingface<ZambaCase, float>(folder.path / "saved");
    for (std::size_t i = 0; i < model.entries().size(); ++i) {
      const auto wanted = model.read(model.entries()[i]), got = saved.read(saved.entries()[i]);
      CHECK(std::vector<float>(wanted.begin(), wanted.end()) == std::vector<float>(got.begin(), got.end()));
    }
  }
}
