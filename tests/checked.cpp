// SPDX-License-Identifier: MIT
// A program of the checked build: ZAMBA_CHECKED is defined for all of it.
#include <zamba/checked.hpp>

#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/dry_run.hpp>
#include <zamba/train/adamw.hpp>

#include "support/nets.hpp"

#ifndef ZAMBA_CHECKED
#error "tests/checked.cpp is compiled with ZAMBA_CHECKED"
#endif

namespace {

using namespace zamba_test;

/// Memory of views that nobody reads: what is wrong is said before.
struct Views {
  std::vector<float> memory = std::vector<float>(4096, 1.0f);
  Matrix<float> matrix(Index rows, Index cols) { return {memory.data(), rows, cols}; }
  Vector<float> vector(Index size) { return {memory.data(), size}; }
  Tensor<float, 3> tensor(Index a, Index b, Index c) { return {memory.data(), a, b, c}; }
};

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace

TEST_SUITE("checked") {
  TEST_CASE("views check positions and extents") {
    Views v;
    const Matrix<float> m = v.matrix(3, 4);
    CHECK(message_of([&] { m(3, 0) = 1; }) == "zamba: Tensor: position 3 is outside extent 0, which is 3");
    CHECK(message_of([&] { m(0, 4) = 1; }) == "zamba: Tensor: position 4 is outside extent 1, which is 4");
    CHECK(message_of([&] { m(-1, 0) = 1; }) == "zamba: Tensor: position -1 is outside extent 0, which is 3");
    CHECK(message_of([&] { m[3]; }) == "zamba: Tensor: position 3 is outside extent 0, which is 3");
    CHECK(message_of([&] { m[2][4] = 1; }) == "zamba: Tensor: position 4 is outside extent 0, which is 4");
    CHECK(message_of([&] { m.slice(2, 2); }) == "zamba: Tensor: positions [2, 4) are outside extent 0, which is 3");
    CHECK(message_of([&] { m.slice(1, -1); }) == "zamba: Tensor: positions [1, 0) are outside extent 0, which is 3");
    CHECK(message_of([&] { m.columns(-1, 2); }) == "zamba: Tensor: positions [-1, 1) are outside extent 1, which is 4");
    CHECK(message_of([&] { m.columns(1, 4); }) == "zamba: Tensor: positions [1, 5) are outside extent 1, which is 4");
    CHECK(message_of([&] { m.columns(0, 2).flat(); }) == "zamba: Tensor: flat() of a view that is not contiguous");
    CHECK(message_of([&] { v.tensor(2, 3, 4).columns(0, 2).as_matrix(); }) ==
          "zamba: Tensor: as_matrix() of a view that is not contiguous");
    CHECK(message_of([&] { v.matrix(2, -3); }) == "zamba: Tensor: extent 1 is -3, wanted 0 or more");
    CHECK(message_of([&] { split_heads(m, 3); }) == "zamba: split_heads: 4 columns in 3 heads");
    CHECK(message_of([&] { head_of(v.tensor(2, 3, 4), 3); }) == "zamba: head_of: head 3 of 3");
    CHECK_NOTHROW(m.slice(3, 0).columns(4, 0));
    CHECK_NOTHROW(m.slice(1, 2).flat()[7] = 1);
    CHECK_NOTHROW(m.columns(1, 1).slice(2, 1).flat());
    CHECK_FALSE(Matrix<float>().columns(3, 1));
  }

  TEST_CASE("operators check shapes at their doors, and name what is wrong") {
    Views v;
    Context<cpu> ctx(2);
    const auto m = [&](Index rows, Index cols) { return v.matrix(rows, cols); };
    CHECK(message_of([&] { linear(ctx, m(5, 3), m(4, 3), m(5, 3)); }) == "zamba: linear: y is (5, 3), wanted (5, 4)");
    CHECK(message_of([&] { linear(ctx, m(5, 2), m(4, 3), m(5, 4)); }) == "zamba: linear: x is (5, 2), wanted (5, 3)");
    CHECK(message_of([&] { linear(ctx, m(5, 3), m(4, 3), m(5, 4), {}, v.vector(3)); }) ==
          "zamba: linear: bias is (3), wanted (4)");
    CHECK(message_of([&] { linear_backward(ctx, m(5, 4), m(5, 3), m(4, 3), m(5, 2), Accumulate::no, {}); }) ==
          "zamba: linear_backward: d_x is (5, 2), wanted (5, 3)");
    CHECK(message_of([&] { rms_norm(ctx, m(5, 4), {}, v.vector(3), 1e-5, m(5, 4), v.vector(5)); }) ==
          "zamba: rms_norm: weight is (3), wanted (4)");
    CHECK(message_of([&] { rms_norm_concat(ctx, m(5, 4), m(5, 3), v.vector(8), 1e-5, m(5, 8), v.vector(5)); }) ==
          "zamba: rms_norm_concat: b is (5, 3), wanted (5, 4)");
    CHECK(message_of([&] { gated_activation(ctx, Activation::silu, m(5, 4), m(4, 4), m(5, 4)); }) ==
          "zamba: gated_activation: up is (4, 4), wanted (5, 4)");
    CHECK(message_of([&] { add(ctx, m(5, 4), m(5, 3)); }) == "zamba: add: from is (5, 4), wanted (5, 3)");
    const Token tokens[] = {1, 2, 3};
    CHECK(message_of([&] { embedding(ctx, tokens, 3, m(9, 4), m(3, 5)); }) ==
          "zamba: embedding: out is (3, 5), wanted (3, 4)");
    CHECK(message_of([&] { cross_entropy(ctx, m(3, 5), m(9, 4), tokens); }) ==
          "zamba: cross_entropy: h is (3, 5), wanted (3, 4)");
    const Index offsets[] = {0, 3};
    const Sequences rows{offsets, nullptr, 1, 3, 3};
    CHECK(message_of([&] { rope(ctx, {2, 4, 1e4}, rows, m(3, 7)); }) == "zamba: rope: x is (3, 7), wanted (3, 8)");
    const Tensor<float, 3> none;
    CHECK(message_of([&] {
            causal_conv1d(ctx, m(3, 4), Matrix<const float>(m(4, 4)), {}, rows, v.tensor(1, 2, 4), m(3, 4));
          }) == "zamba: causal_conv1d: state is (1, 2, 4), wanted (1, 3, 4)");
    CHECK(message_of([&] {
            attention(ctx, {2, 1, 4, 0.5}, m(3, 8), m(3, 8), m(3, 4), rows, none, none, m(3, 8), m(3, 2));
          }) == "zamba: attention: k is (3, 8), wanted (3, 4)");
    SelectiveScanInputs<float, float> in{m(3, 8),           m(3, 8), m(3, 7),     v.tensor(3, 2, 4),
                                         v.tensor(3, 2, 4), m(8, 4), v.vector(8), v.vector(8)};
    CHECK(message_of([&] { selective_scan(ctx, in, rows, none, m(3, 8)); }) ==
          "zamba: selective_scan: z is (3, 7), wanted (3, 8)");
    SsdInputs<float, float> ssd_in{m(3, 8),     m(3, 2),     v.tensor(3, 1, 4), v.tensor(3, 1, 5),
                                   v.vector(2), v.vector(2), v.vector(2)};
    CHECK(message_of([&] { ssd(ctx, ssd_in, rows, none, m(3, 8)); }) == "zamba: ssd: C is (3, 1, 5), wanted (3, 1, 4)");
  }

  TEST_CASE("what a task throws arrives at the caller, from any thread") {
    Views v;
    for (const int threads : {1, 2}) {
      Context<cpu> ctx(threads);
      const Matrix<float> m = v.matrix(100, 4);
      CHECK(message_of([&] { ctx.parallel_for(101, [&](Index i, int) { m(i, 0) = 1; }); }) ==
            "zamba: Tensor: position 100 is outside extent 0, which is 100");
    }
  }

  TEST_CASE("whole models run, and train, without a complaint") {
    const auto run = [](auto model) {
      using M = decltype(model);
      Context<cpu> ctx(2);
      auto state = model.new_state({.batch = 3, .max_length = 120});
      model.extend(ctx, state, {random_tokens(55), std::vector<Index>{50, 0, 5}}, Positions::all);
      model.extend(ctx, state, {random_tokens(3), std::vector<Index>{1, 1, 1}});
      model.extend(ctx, state, {random_tokens(2), std::vector<Index>{1, 1, 0}});
      const std::vector<Token> tokens = random_tokens(80, 7);
      const std::vector<Index> offsets{0, 40, 40, 80};
      auto gradients = model.new_gradients();
      auto d_state = model.new_state_gradients(state);
      AdamW optimiser(model);
      for (const bool recompute : {false, true}) {
        auto copy = state;
        CHECK(model
                  .loss_and_gradients(ctx, {tokens, tokens, offsets}, gradients,
                                      {.recompute = recompute, .state = &copy, .d_state = &d_state})
                  .count == 80);
        optimiser.step(ctx, model, gradients, 1e-3);
      }
      CHECK(M::workspace_bytes({3, 120}) > 0);
    };
    run(random_model<TwoAdapted, float>());
    run(random_model<Second, bf16>());
    run(random_model<NestedTransformer, float>());
  }
}
