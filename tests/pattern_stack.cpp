// SPDX-License-Identifier: MIT
#include <zamba/pattern_stack.hpp>

#include <string>

#include <doctest/doctest.h>

#include <zamba/models/zamba_7b.hpp>

#include "support/extend_properties.hpp"

using namespace zamba_test;

namespace {

template <class P>
std::string letters(const P& pattern) {
  return std::string(pattern.letters, static_cast<std::size_t>(P::layers()));
}

}  // namespace

TEST_SUITE("pattern_stack") {
  TEST_CASE("patterns") {
    CHECK(letters(uniform_pattern<3>) == "mmm");
    CHECK(letters(periodic_pattern<12, 6>) == "mmmmmhmmmmmh");
    CHECK(letters(periodic_pattern<3, 1>) == "hhh");
    // Zamba-7B-v1: 2, 7, 13, 19, ..., 73.
    std::string published(76, 'm');
    published[2] = 'h';
    for (std::size_t i = 7; i <= 73; i += 6) published[i] = 'h';
    CHECK(letters(zamba_pattern<76, 6, 4>) == published);
    CHECK(Zamba7B::Stack::uses == 13);
    CHECK(Hybrid::Stack::pattern.uses_before(3) == 1);
    CHECK(TwoCopies::Stack::pattern.uses_before(3) == 2);
  }

  TEST_CASE("sizes are those of a count by hand") {
    // norm 16, in_proj 64 * 16, conv 32 * 4 + 32, x_proj 2 * 9 * 16, dt_proj 32 + 32, A_log 32 * 4, D 32, out_proj 512
    constexpr Index mixer = 16 + 1024 + 160 + 288 + 64 + 128 + 32 + 512;
    // norm 32, q 32 * 32, k and v 16 * 32 each, o 16 * 32, norm 16, three matrices of 24 * 16
    constexpr Index shared = 32 + 1024 + 2 * 512 + 512 + 16 + 3 * 384;
    constexpr Index linear = 256, ends = 29 * 16 + 16;
    CHECK(parameter_count<Mixer> == mixer);
    CHECK(parameter_count<Shared> == shared);
    CHECK(parameter_count<Hybrid> == 4 * mixer + shared + 2 * linear + ends);
    CHECK(active_parameter_count<Hybrid> == 4 * mixer + 2 * (shared + linear) + ends);
    CHECK(flops_per_token<Hybrid> == 2 * active_parameter_count<Hybrid>);
    CHECK(parameter_count<TwoCopies> == 4 * mixer + 2 * shared + 3 * linear + ends);
    CHECK(active_parameter_count<TwoCopies> == 4 * mixer + 3 * (shared + linear) + ends);
    constexpr Index inner = 2 * mixer + shared + linear;
    CHECK(parameter_count<Nested> == 3 * inner + shared + linear + ends);
    CHECK(active_parameter_count<Nested> == parameter_count<Nested>);  // every shared block has one use
    // d 20, D 40, N 5, R 2, K 3, with biases.
    constexpr Index wide = 20 + 80 * 20 + 80 + 40 * 3 + 40 + 12 * 40 + 40 * 2 + 40 + 40 * 5 + 40 + 20 * 40 + 20;
    CHECK(parameter_count<Plain> == 2 * wide + 29 * 20 + 20);
    CHECK(active_parameter_count<Plain> == parameter_count<Plain>);

    // Per sequence and layer (K - 1 + N) * 32 floats; per use and position keys and values of 16.
    constexpr Index recurrent = 4 * (3 + 4) * 32 * 4;
    CHECK(state_bytes<Hybrid, float>(1, 10) == recurrent + 2 * 10 * 32 * 4);
    CHECK(state_bytes<Hybrid, bf16>(3, 10) == 3 * (recurrent + 2 * 10 * 32 * 2));
    CHECK(state_bytes<Hybrid, double>(1, 10) == 2 * state_bytes<Hybrid, float>(1, 10));
    CHECK(state_bytes<Plain, float>(1, 1000) == state_bytes<Plain, float>(1, 1));
  }

  TEST_CASE("Zamba-7B-v1 has its published sizes") {
    CHECK(parameter_count<Zamba7B> == 7'232'490'496);
    CHECK(parameter_count<Zamba7B::Stack::SharedType> == 358'263'680);
    CHECK(active_parameter_count<Zamba7B> == 7'232'490'496 + Index{12} * 358'263'680);  // 13 uses: 23.06 GFLOP a token
    // 386,048 bytes a token in bf16, and 36.1 MB a sequence whatever its length.
    constexpr Index of_token = state_bytes<Zamba7B, bf16>(1, 2) - state_bytes<Zamba7B, bf16>(1, 1);
    CHECK(of_token == 386'048);
    CHECK(state_bytes<Zamba7B, bf16>(1, 0) == 76 * 7424 * 16 * 4 + 76 * 7424 * 3 * 4);
  }

  TEST_CASE("names of a nested stack are whole and unique") {
    const auto entries = zamba::detail::list_parameters<Nested, float>();
    std::vector<std::string> names;
    for (const ParameterEntry& entry : entries) names.push_back(entry.name);
    CHECK(std::count(names.begin(), names.end(), "layers.2.layers.1.linear.weight") == 1);
    CHECK(std::count(names.begin(), names.end(), "layers.1.shared.0.q_proj.weight") == 1);
    std::sort(names.begin(), names.end());
    CHECK(std::adjacent_find(names.begin(), names.end()) == names.end());
  }

  TEST_CASE("extend: Mamba layers only") { check_extend<Plain, double>(); }
  TEST_CASE("extend: stacks of stacks") { check_extend<Nested, double>(); }
}
