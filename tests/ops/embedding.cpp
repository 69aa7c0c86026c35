// SPDX-License-Identifier: MIT
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/embedding.hpp>

#ifndef ZAMBA_TEST_ON
#define ZAMBA_TEST_ON On<cpu, float>, On<cpu, double>, On<cpu, bf16>
#endif

#include "../support/arrays.hpp"
#include "../support/devices.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

/// A table stored as T.
template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
};

std::vector<Token> random_tokens(Index count, Index vocabulary) {
  Random random(Seed{11});
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (auto& token : tokens) token = static_cast<Token>(random.below(vocabulary));
  return tokens;
}

}  // namespace

TEST_CASE_TEMPLATE("embedding: copies the rows, converting them", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using W = typename Where::type;
  using A = activation_t<W, Device>;
  // Rows of odd widths and gaps, and rows that lie in whole pieces of 16 bytes, of one block of threads and of more.
  struct Layout {
    Index width, gap;
  };
  for (const Layout layout : {Layout{70, 3}, Layout{72, 3}, Layout{72, 8}, Layout{8, 0}, Layout{2056, 8}})
    for (Index count : {1, 5, 40, 333}) {
      if (count > 5 && layout.width > 72) continue;
      CAPTURE(layout.width);
      CAPTURE(layout.gap);
      CAPTURE(count);
      auto ctx = new_context<Device>(2);
      const auto tokens = random_tokens(count, 19);
      const Array<Device, Token> on_device(Values(tokens.begin(), tokens.end()));
      const PaddedMatrix<Device, W> table(normal_values(19 * layout.width, 1), 19, layout.gap);
      const Index all = layout.width + layout.gap, first = layout.gap / 8 * 8;  // out is a slice of columns
      const Array<Device, A> out(normal_values(count * all, 2));
      const Values before = out.values(), rows = table.values();
      embedding(ctx, on_device.view(count).data, count, table.view(),
                out.view(count, all).columns(first, layout.width));
      const Values after = out.values();
      bool equal = true;
      for (Index t = 0; t < count; ++t)
        for (Index j = 0; j < all; ++j) {
          const Index c = j - first, token = tokens[static_cast<std::size_t>(t)];
          const auto at = static_cast<std::size_t>(t * all + j);
          equal = equal &&
                  after[at] == (c < 0 || c >= layout.width ? before[at]
                                                           : rows[static_cast<std::size_t>(token * layout.width + c)]);
        }
      CHECK(equal);
    }
}

TEST_CASE_TEMPLATE("embedding: of no tokens nothing is written", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using W = typename Where::type;
  auto ctx = new_context<Device>(2);
  const PaddedMatrix<Device, W> table(normal_values(32, 1), 4);
  const Array<Device, activation_t<W, Device>> out(normal_values(8, 2));
  const Values before = out.values();
  embedding(ctx, static_cast<const Token*>(nullptr), 0, table.view(), out.view(0, 8));
  CHECK(out.values() == before);
}

TEST_CASE_TEMPLATE("embedding: gradients add up in the order of the tokens, for any number of threads", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = activation_t<typename Where::type, Device>;
  using F = compute_t<A>;
  const Index vocabulary = 19;
  for (const Index width : {130, 136})
    for (const Index count : {0, 1, 333}) {
      CAPTURE(width);
      CAPTURE(count);
      const auto tokens = random_tokens(count, vocabulary);
      const Array<Device, Token> on_device(Values(tokens.begin(), tokens.end()));
      const auto d_out = PaddedMatrix<Device, A>::of_width(normal_values(count * width, 1), width, 8);
      const Values start = normal_values(vocabulary * width, 2), rows = d_out.values();
      std::vector<F> wanted(start.begin(), start.end());
      for (Index t = 0; t < count; ++t)
        for (Index c = 0; c < width; ++c)
          wanted[static_cast<std::size_t>(tokens[static_cast<std::size_t>(t)] * width + c)] +=
              static_cast<F>(rows[static_cast<std::size_t>(t * width + c)]);
      for (int threads : {1, 2, 3}) {
        auto ctx = new_context<Device>(threads);
        const PaddedMatrix<Device, F> d_table(start, vocabulary, 4);
        embedding_backward(ctx, on_device.view(count).data, count, d_out.view(), d_table.view());
        CHECK(d_table.values() == Values(wanted.begin(), wanted.end()));
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
