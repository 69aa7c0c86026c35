// SPDX-License-Identifier: MIT
#include <cmath>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/ops/cross_entropy.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"
#include "../support/fixture.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
};

/// Targets in [0, vocabulary), about one in four negative.
std::vector<Token> random_targets(Index count, Index vocabulary) {
  Random random(Seed{13});
  std::vector<Token> targets(static_cast<std::size_t>(count));
  for (auto& target : targets) target = random.below(4) == 0 ? Token{-1} : static_cast<Token>(random.below(vocabulary));
  return targets;
}

/// Loss and d_logits by plain loops in double, of logits that are stored as A.
template <class A>
struct Plain {
  Plain(const Values& h, const Values& head, const std::vector<Token>& targets, Index width, double scale,
        double z_loss)
      : d_logits(targets.size() * (head.size() / static_cast<std::size_t>(width))) {
    const Index vocabulary = static_cast<Index>(head.size()) / width;
    for (Index t = 0; t < static_cast<Index>(targets.size()); ++t) {
      const Token target = targets[static_cast<std::size_t>(t)];
      if (target < 0) continue;
      double* z = d_logits.data() + t * vocabulary;
      double sum = 0;
      for (Index v = 0; v < vocabulary; ++v) {
        for (Index k = 0; k < width; ++k)
          z[v] += h[static_cast<std::size_t>(t * width + k)] * head[static_cast<std::size_t>(v * width + k)];
        if constexpr (std::is_same_v<A, bf16>) z[v] = bf16(static_cast<float>(z[v]));
        sum += std::exp(z[v]);
      }
      const double lse = std::log(sum);
      loss.sum += lse - z[target] + z_loss * lse * lse;
      ++loss.count;
      for (Index v = 0; v < vocabulary; ++v)
        z[v] = scale * ((1 + 2 * z_loss * lse) * std::exp(z[v]) / sum - (v == target));
    }
  }
  LossSum loss;
  Values d_logits;
};

/// Logits of a few tens of terms, exponentials and products, all to rounding; by norm. In bf16 d_logits are rounded to
/// 8 bits, at most 2^-9 of each, and so is d_h.
template <class A>
constexpr double rounding = std::is_same_v<A, double> ? 1e-13
                            : std::is_same_v<A, bf16> ? 0x1p-8
                                                      : 5e-6;
/// In bf16 one logit in ten thousand may be rounded to the other side, by which one position's loss changes by 2^-8 of
/// that logit.
template <class A>
constexpr double rounding_of_loss = std::is_same_v<A, bf16> ? 2e-4 : rounding<A>;

/// Targets as a device reads them.
template <class Device>
Array<Device, Token> on_device(const std::vector<Token>& targets) {
  return Array<Device, Token>(Values(targets.begin(), targets.end()));
}

template <class Device, class A, class W>
void check(Index n, Index width, Index vocabulary, Index gap = 3, double z_loss = 0) {
  using F = compute_t<A>;
  CAPTURE(n);
  CAPTURE(width);
  CAPTURE(vocabulary);
  CAPTURE(z_loss);
  auto ctx = new_context<Device>(2);
  const auto size = n * width;
  const auto h = PaddedMatrix<Device, A>::of_width(normal_values(size, 1), width, gap);
  const auto d_h = PaddedMatrix<Device, A>::of_width(nans(static_cast<std::size_t>(size)), width, gap);
  const PaddedMatrix<Device, W> head(normal_values(vocabulary * width, 2), vocabulary, gap);
  const PaddedMatrix<Device, F> d_head(normal_values(vocabulary * width, 4), vocabulary, gap);
  const auto targets = random_targets(n, vocabulary);
  const auto there = on_device<Device>(targets);
  const double scale = 0.37;
  const Values hs = h.values(), heads = head.values();
  const Plain<A> plain(hs, heads, targets, width, scale, z_loss);
  Values wanted_h(hs.size()), wanted_head = d_head.values();
  const LossSum loss = cross_entropy(ctx, h.view(), head.view(), there.view(n).data, z_loss);
  CHECK(loss.count == plain.loss.count);
  // A position's loss is a difference of logits of order 1 or more, so its rounding does not shrink with it.
  CHECK(std::abs(loss.sum - plain.loss.sum) <=
        rounding_of_loss<A> * (plain.loss.sum + static_cast<double>(loss.count)));
  const LossSum again =
      cross_entropy_backward(ctx, h.view(), head.view(), there.view(n).data, scale, d_h.view(), d_head.view(), z_loss);
  CHECK(again.sum == loss.sum);
  CHECK(again.count == loss.count);
  for (Index t = 0; t < n; ++t)
    for (Index v = 0; v < vocabulary; ++v) {
      const double d = plain.d_logits[static_cast<std::size_t>(t * vocabulary + v)];
      for (Index k = 0; k < width; ++k) {
        const auto of_h = static_cast<std::size_t>(t * width + k), of_head = static_cast<std::size_t>(v * width + k);
        wanted_h[of_h] += d * heads[of_head];
        wanted_head[of_head] += d * hs[of_h];
      }
    }
  CHECK(relative_error(d_h.values(), wanted_h) <= rounding<A>);
  CHECK(relative_error(d_head.values(), wanted_head) <= rounding<A>);
}

}  // namespace

TEST_CASE_TEMPLATE("cross_entropy: the reference", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  // The logits are given: they are h, and the head is the identity. The fixture's loss is the mean, stored as float;
  // in bf16 a logit is off by 2^-9 of itself.
  const double tolerance = std::is_same_v<A, bf16> ? 0x1p-7 : 1e-6;
  const auto& fixture = Fixture::operators();
  const auto raw = fixture.values("cross_entropy.in.logits"), ids = fixture.values("cross_entropy.in.targets");
  const auto wanted = fixture.values("cross_entropy.grad.logits");
  const double loss = fixture.values("cross_entropy.out.loss")[0];
  const double cotangent = fixture.values("cross_entropy.cotangent.loss")[0];
  Values identity(31 * 31);
  for (std::size_t i = 0; i < 31; ++i) identity[i * 32] = 1;
  const Array<Device, A> logits(raw), weights(identity), d_h(nans(raw.size()));
  const Array<Device, compute_t<A>> d_head{Values(31 * 31)};
  const Array<Device, Token> targets(ids);
  const auto h = logits.view(24, 31), head = weights.view(31, 31);
  auto ctx = new_context<Device>(2);
  const LossSum got = cross_entropy(ctx, h, head, targets.view(24).data);
  CHECK(got.count == 24);
  CHECK(std::abs(got.mean() - loss) <= tolerance * loss);
  cross_entropy_backward(ctx, h, head, targets.view(24).data, cotangent / 24, d_h.view(24, 31), d_head.view(31, 31));
  CHECK(relative_error(d_h.values(), wanted) <= tolerance);
}

TEST_CASE_TEMPLATE("cross_entropy: plain loops agree, for odd extents, strides and missing targets", Where,
                   ZAMBA_TEST_ON) {
  using A = typename Where::type;
  for (Index n : {0, 1, 5, 17, 40})
    for (Index vocabulary : {1, 3, 16, 100, 1031}) check<typename Where::device, A, A>(n, 13, vocabulary);
  // Rows in pieces of 16 bytes, of more than one for a thread.
  check<typename Where::device, A, A>(33, 16, 9000, 8);
  for (const double z_loss : {1e-4, 0.3}) check<typename Where::device, A, A>(40, 13, 100, 3, z_loss);
}

TEST_CASE("cross_entropy: bf16 heads") { check<cpu, float, bf16>(40, 33, 257); }

TEST_CASE_TEMPLATE("cross_entropy: more positions than one tile holds", A, float, double) {
  check<cpu, A, A>(11, 3, 1000003);  // four positions a tile
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
  const auto targets = random_targets(6, 9);
  const double scale = 0.6;
  for (const double z_loss : {0.0, 0.2}) {
    CAPTURE(z_loss);
    Strided<double> h(6, 5, 0, 1), head(9, 5, 0, 2), d_h(6, 5, 0, 3);
    std::vector<double> d_head(45);
    cross_entropy_backward(ctx, h.view, head.view, targets.data(), scale, d_h.view, Matrix<double>(d_head.data(), 9, 5),
                           z_loss);
    const auto loss = [&] { return scale * cross_entropy(ctx, h.view, head.view, targets.data(), z_loss).sum; };
    // Central differences of step s are exact to s^2 / 6 of the third derivative, which is of order 1 here.
    CHECK(relative_error(d_h.values, finite_differences(h.values, 1e-4, loss)) <= 1e-7);
    CHECK(relative_error(d_head, finite_differences(head.values, 1e-4, loss)) <= 1e-7);
  }
}

TEST_CASE_TEMPLATE("cross_entropy: huge logits stay finite, NaN does not hide", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  auto ctx = new_context<Device>(1);
  const Array<Device, A> head({1, 0, 0, 0, 1, 0, 0, 0, 1});
  const Array<Device, Token> target({1});
  const auto loss_of = [&](const Values& logits) {
    const Array<Device, A> h(logits);
    return cross_entropy(ctx, h.view(1, 3), head.view(3, 3), target.view(1).data).sum;
  };
  CHECK(loss_of({3e4, -3e4, 0}) == doctest::Approx(6e4).epsilon(std::is_same_v<A, bf16> ? 0x1p-8 : 1e-6));
  CHECK(std::isnan(loss_of({3e4, -3e4, std::nan("")})));
}

TEST_CASE_TEMPLATE("cross_entropy: without any target the loss is nothing", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using A = typename Where::type;
  auto ctx = new_context<Device>(1);
  const Array<Device, A> h(normal_values(12, 1)), head(normal_values(20, 2)), d_h(nans(12));
  const Array<Device, compute_t<A>> d_head(normal_values(20, 4));
  const Array<Device, Token> targets({-1, -1, -1});
  const Values before = d_head.values();
  const LossSum loss = cross_entropy_backward(ctx, h.view(3, 4), head.view(5, 4), targets.view(3).data, 1.0,
                                              d_h.view(3, 4), d_head.view(5, 4));
  CHECK(loss.count == 0);
  CHECK(loss.mean() == 0);
  CHECK(d_h.values() == Values(12));
  CHECK(d_head.values() == before);
}
