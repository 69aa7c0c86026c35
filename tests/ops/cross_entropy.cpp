// SPDX-License-Identifier: MIT
#include <cmath>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/cross_entropy.hpp>

#include "../support/arrays.hpp"
#include "../support/fixture.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

/// Targets in [0, vocabulary), about one in four negative.
std::vector<Token> random_targets(Index count, Index vocabulary) {
  Random random(Seed{13});
  std::vector<Token> targets(static_cast<std::size_t>(count));
  for (auto& target : targets) target = random.below(4) == 0 ? Token{-1} : static_cast<Token>(random.below(vocabulary));
  return targets;
}

/// Loss and d_logits by plain loops in double.
struct Plain {
  template <class A, class W>
  Plain(Matrix<A> h, Matrix<W> head, const std::vector<Token>& targets, double scale)
      : d_logits(static_cast<std::size_t>(h.rows() * head.rows())) {
    const Index vocabulary = head.rows();
    for (Index t = 0; t < h.rows(); ++t) {
      const Token target = targets[static_cast<std::size_t>(t)];
      if (target < 0) continue;
      double* z = d_logits.data() + t * vocabulary;
      double sum = 0;
      for (Index v = 0; v < vocabulary; ++v) {
        for (Index k = 0; k < h.cols(); ++k)
          z[v] += static_cast<double>(h(t, k)) * static_cast<double>(static_cast<compute_t<W>>(head(v, k)));
        sum += std::exp(z[v]);
      }
      loss.sum += std::log(sum) - z[target];
      ++loss.count;
      for (Index v = 0; v < vocabulary; ++v) z[v] = scale * (std::exp(z[v]) / sum - (v == target));
    }
  }
  LossSum loss;
  std::vector<double> d_logits;
};

/// Logits of a few tens of terms, exponentials and products, all to rounding; by norm.
template <class A>
constexpr double rounding = std::is_same_v<A, double> ? 1e-13 : 5e-6;

template <class A, class W>
void check(Index n, Index width, Index vocabulary, int threads) {
  CAPTURE(n);
  CAPTURE(width);
  CAPTURE(vocabulary);
  Context<cpu> ctx(threads);
  Strided<A> h(n, width, 3, 1), d_h(n, width, 1, 3);
  Strided<W> head(vocabulary, width, 2, 2);
  Strided<A> d_head(vocabulary, width, 2, 4), before(vocabulary, width, 2, 4);
  const auto targets = random_targets(n, vocabulary);
  const double scale = 0.37;
  const Plain plain(h.view, head.view, targets, scale);
  const LossSum loss = cross_entropy(ctx, h.view, head.view, targets.data());
  CHECK(loss.count == plain.loss.count);
  // A position's loss is a difference of logits of order 1 or more, so its rounding does not shrink with it.
  CHECK(std::abs(loss.sum - plain.loss.sum) <= rounding<A> * (plain.loss.sum + static_cast<double>(loss.count)));
  const LossSum again = cross_entropy_backward(ctx, h.view, head.view, targets.data(), scale, d_h.view, d_head.view);
  CHECK(again.sum == loss.sum);
  CHECK(again.count == loss.count);
  CHECK(relative_error(d_h.view, [&](Index t, Index k) {
          double sum = 0;
          for (Index v = 0; v < vocabulary; ++v)
            sum += plain.d_logits[static_cast<std::size_t>(t * vocabulary + v)] *
                   static_cast<double>(static_cast<A>(head.view(v, k)));
          return sum;
        }) <= rounding<A>);
  CHECK(relative_error(d_head.view, [&](Index v, Index k) {
          double sum = static_cast<double>(before.view(v, k));
          for (Index t = 0; t < n; ++t)
            sum += plain.d_logits[static_cast<std::size_t>(t * vocabulary + v)] * static_cast<double>(h.view(t, k));
          return sum;
        }) <= rounding<A>);
}

}  // namespace

TEST_CASE_TEMPLATE("cross_entropy: the reference", A, float, double) {
  // The logits are given: they are h, and the head is the identity. The fixture's loss is the mean, stored as float.
  const auto& fixture = Fixture::operators();
  const auto raw = fixture.values("cross_entropy.in.logits"), ids = fixture.values("cross_entropy.in.targets");
  const auto wanted = fixture.values("cross_entropy.grad.logits");
  const double loss = fixture.values("cross_entropy.out.loss")[0];
  const double cotangent = fixture.values("cross_entropy.cotangent.loss")[0];
  std::vector<A> logits(raw.begin(), raw.end()), identity(31 * 31), d_h(raw.size()), d_head(31 * 31);
  for (std::size_t i = 0; i < 31; ++i) identity[i * 32] = 1;
  const std::vector<Token> targets(ids.begin(), ids.end());
  const Matrix<A> h(logits.data(), 24, 31), head(identity.data(), 31, 31);
  Context<cpu> ctx(2);
  const LossSum got = cross_entropy(ctx, h, head, targets.data());
  CHECK(got.count == 24);
  CHECK(std::abs(got.mean() - loss) <= 1e-6 * loss);
  cross_entropy_backward(ctx, h, head, targets.data(), cotangent / 24, Matrix<A>(d_h.data(), 24, 31),
                         Matrix<A>(d_head.data(), 31, 31));
  CHECK(relative_error(d_h, wanted) <= 1e-6);
}

TEST_CASE_TEMPLATE("cross_entropy: plain loops agree, for odd extents, strides and missing targets", A, float, double) {
  for (Index n : {0, 1, 5, 17, 40})
    for (Index vocabulary : {1, 3, 16, 100, 1031}) check<A, A>(n, 13, vocabulary, 2);
}

TEST_CASE("cross_entropy: bf16 heads") { check<float, bf16>(40, 33, 257, 2); }

TEST_CASE_TEMPLATE("cross_entropy: more positions than one tile holds", A, float, double) {
  check<A, A>(11, 3, 1000003, 2);  // four positions a tile
}

TEST_CASE_TEMPLATE("cross_entropy: bit-equal on one, two and three threads", A, float, double) {
  std::vector<std::vector<A>> first;
  std::vector<double> sums;
  const auto targets = random_targets(333, 700);
  for (int threads : {1, 2, 3}) {
    Context<cpu> ctx(threads);
    Strided<A> h(333, 40, 0, 1), head(700, 40, 0, 2), d_h(333, 40, 0, 3), d_head(700, 40, 0, 4);
    sums.push_back(cross_entropy_backward(ctx, h.view, head.view, targets.data(), 0.1, d_h.view, d_head.view).sum);
    const std::vector<std::vector<A>> all = {d_h.values, d_head.values};
    if (first.empty()) first = all;
    CHECK(all == first);
    CHECK(sums.back() == sums.front());
  }
}

TEST_CASE("cross_entropy: gradients agree with finite differences") {
  Context<cpu> ctx(1);
  Strided<double> h(6, 5, 0, 1), head(9, 5, 0, 2), d_h(6, 5, 0, 3);
  std::vector<double> d_head(45);
  const auto targets = random_targets(6, 9);
  const double scale = 0.6;
  cross_entropy_backward(ctx, h.view, head.view, targets.data(), scale, d_h.view, Matrix<double>(d_head.data(), 9, 5));
  const auto loss = [&] { return scale * cross_entropy(ctx, h.view, head.view, targets.data()).sum; };
  // Central differences of step s are exact to s^2 / 6 of the third derivative, which is of order 1 here.
  CHECK(relative_error(d_h.values, finite_differences(h.values, 1e-4, loss)) <= 1e-7);
  CHECK(relative_error(d_head, finite_differences(head.values, 1e-4, loss)) <= 1e-7);
}

TEST_CASE_TEMPLATE("cross_entropy: huge logits stay finite, NaN does not hide", A, float, double) {
  Context<cpu> ctx(1);
  std::vector<A> logits = {A(3e4), A(-3e4), A(0)}, identity = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  const Matrix<A> h(logits.data(), 1, 3), head(identity.data(), 3, 3);
  const Token target = 1;
  CHECK(cross_entropy(ctx, h, head, &target).sum == doctest::Approx(6e4).epsilon(1e-6));
  logits[2] = std::nan("");
  CHECK(std::isnan(cross_entropy(ctx, h, head, &target).sum));
}

TEST_CASE("cross_entropy: without any target the loss is nothing") {
  Context<cpu> ctx(1);
  Strided<float> h(3, 4, 0, 1), head(5, 4, 0, 2), d_h(3, 4, 0, 3), d_head(5, 4, 0, 4), before(5, 4, 0, 4);
  const std::vector<Token> targets(3, -1);
  const LossSum loss = cross_entropy_backward(ctx, h.view, head.view, targets.data(), 1.0, d_h.view, d_head.view);
  CHECK(loss.count == 0);
  CHECK(loss.mean() == 0);
  CHECK(d_h.values == std::vector<float>(12));
  CHECK(d_head.values == before.values);
}
