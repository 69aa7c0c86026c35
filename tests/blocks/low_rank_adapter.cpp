// SPDX-License-Identifier: MIT
#include <zamba/blocks/low_rank_adapter.hpp>

#include <vector>

#include <doctest/doctest.h>

#include <zamba/testing/report.hpp>

using namespace zamba;

namespace {

using Adapter = LowRankAdapter<6, 7, 2>;
using None = LowRankAdapter<6, 7, 0>;

std::vector<double> normal(Index count, std::uint64_t stream) {
  Random random(Seed{7}, stream);
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) value = random.normal();
  return values;
}

Index count(auto visit_all) {
  Index parameters = 0;
  auto visit = [&](const Name&, auto&, auto shape, Initializer, Decay) { parameters += shape.size(); };
  visit_all(ParameterVisitor(visit));
  return parameters;
}

}  // namespace

TEST_SUITE("low_rank_adapter") {
  TEST_CASE("adds the product with B A, and its gradients are those of that product") {
    constexpr Index tokens = 5;
    auto x = normal(tokens * 6, 0), a = normal(2 * 6, 1), b = normal(7 * 2, 2), y = normal(tokens * 7, 3);
    const auto before = y, d_y = normal(tokens * 7, 4);
    std::vector<double> d_x(x.size(), 1), d_a(a.size(), 1), d_b(b.size(), 1);  // added to
    Context<cpu> ctx(1);
    ArenaScope scope(ctx.arena());
    const Adapter::Parameters<const double> p{{a.data(), 2, 6}, {b.data(), 7, 2}};
    const Adapter::Parameters<double> d_p{{d_a.data(), 2, 6}, {d_b.data(), 7, 2}};
    const Matrix<double> in(x.data(), tokens, 6), d_in(d_x.data(), tokens, 6);
    const auto low = Adapter::room<double>(ctx.arena(), tokens);
    Adapter::forward(ctx, p, in, low, Matrix<double>(y.data(), tokens, 7));
    Adapter::backward(ctx, p, d_p, in, low, Matrix<const double>(d_y.data(), tokens, 7), d_in);

    auto wanted = before, wanted_x = std::vector<double>(x.size(), 1), wanted_a = std::vector<double>(a.size(), 1),
         wanted_b = std::vector<double>(b.size(), 1);
    for (Index t = 0; t < tokens; ++t)
      for (Index o = 0; o < 7; ++o)
        for (Index r = 0; r < 2; ++r)
          for (Index i = 0; i < 6; ++i) {
            wanted[t * 7 + o] += b[o * 2 + r] * a[r * 6 + i] * x[t * 6 + i];
            wanted_x[t * 6 + i] += d_y[t * 7 + o] * b[o * 2 + r] * a[r * 6 + i];
            wanted_a[r * 6 + i] += d_y[t * 7 + o] * b[o * 2 + r] * x[t * 6 + i];
            wanted_b[o * 2 + r] += d_y[t * 7 + o] * a[r * 6 + i] * x[t * 6 + i];
          }
    // Sums of at most 84 products in another order.
    CHECK(testing::relative_error(y, wanted) <= 1e-14);
    CHECK(testing::relative_error(d_x, wanted_x) <= 1e-14);
    CHECK(testing::relative_error(d_a, wanted_a) <= 1e-14);
    CHECK(testing::relative_error(d_b, wanted_b) <= 1e-14);
  }

  TEST_CASE("rank 0 is nothing") {
    Adapter::Parameters<char> some;
    None::Parameters<char> none;
    CHECK(count([&](auto visit) { Adapter::visit_parameters(some, visit); }) == 2 * 6 + 7 * 2);
    CHECK(count([&](auto visit) { None::visit_parameters(none, visit); }) == 0);
    auto x = normal(6, 0), y = normal(7, 1), d_x = normal(6, 2);
    const auto before = y, d_before = d_x;
    Context<cpu> ctx(1);
    const Matrix<double> in(x.data(), 1, 6), out(y.data(), 1, 7);
    const auto low = None::room<double>(ctx.arena(), in.rows());
    None::forward(ctx, None::Parameters<const double>{}, in, low, out);
    None::backward(ctx, None::Parameters<const double>{}, None::Parameters<double>{}, in, low, out,
                   Matrix<double>(d_x.data(), 1, 6));
    CHECK_FALSE(low);
    CHECK(y == before);
    CHECK(d_x == d_before);
  }
}
