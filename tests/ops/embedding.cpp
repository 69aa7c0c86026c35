// SPDX-License-Identifier: MIT
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/embedding.hpp>

#include "../support/strided.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

std::vector<Token> random_tokens(Index count, Index vocabulary) {
  Random random(Seed{11});
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (auto& token : tokens) token = static_cast<Token>(random.below(vocabulary));
  return tokens;
}

}  // namespace

TEST_CASE_TEMPLATE("embedding: copies the rows, converting them", W, float, double, bf16) {
  using A = compute_t<W>;
  for (Index count : {0, 1, 5, 40, 333}) {
    Context<cpu> ctx(2);
    const auto tokens = random_tokens(count, 19);
    Strided<W> table(19, 70, 3, 1);
    Strided<A> out(count, 70, 2, 2);
    const auto before = out.values;
    embedding(ctx, tokens.data(), count, table.view, out.view);
    bool equal = true;
    for (Index t = 0; t < count; ++t) {
      for (Index j = 0; j < 70; ++j)
        equal = equal && out.view(t, j) == static_cast<A>(table.view(tokens[static_cast<std::size_t>(t)], j));
      equal = equal && out.view.data[t * 72 - 1] == before[static_cast<std::size_t>(t * 72)];
    }
    CHECK(equal);
  }
}

TEST_CASE_TEMPLATE("embedding: gradients add up in the order of the tokens, for any number of threads", A, float,
                   double) {
  for (Index count : {0, 1, 333}) {
    const auto tokens = random_tokens(count, 19);
    Strided<A> d_out(count, 130, 3, 1);
    Strided<A> wanted(19, 130, 2, 2);
    for (Index t = 0; t < count; ++t)
      for (Index j = 0; j < 130; ++j) wanted.view(tokens[static_cast<std::size_t>(t)], j) += d_out.view(t, j);
    for (int threads : {1, 2, 3}) {
      Context<cpu> ctx(threads);
      Strided<A> d_table(19, 130, 2, 2);
      embedding_backward(ctx, tokens.data(), count, d_out.view, d_table.view);
      CHECK(d_table.values == wanted.values);
    }
  }
}

TEST_CASE("embedding: gradients agree with finite differences") {
  // The loss sum(c * out) is linear in the table, so central differences are exact but for rounding.
  Context<cpu> ctx(1);
  const auto tokens = random_tokens(12, 4);
  Strided<double> table(4, 3, 0, 1), cotangent(12, 3, 0, 2), out(12, 3, 0, 3);
  std::vector<double> d_table(12);
  embedding_backward(ctx, tokens.data(), 12, cotangent.view, Matrix<double>(d_table.data(), 4, 3));
  const auto loss = [&] {
    embedding(ctx, tokens.data(), 12, table.view, out.view);
    double sum = 0;
    for (std::size_t i = 0; i < out.values.size(); ++i) sum += cotangent.values[i] * out.values[i];
    return sum;
  };
  CHECK(relative_error(d_table, finite_differences(table.values, 1e-3, loss)) <= 1e-10);
}
