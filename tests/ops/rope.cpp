// SPDX-License-Identifier: MIT
#include <zamba/ops/rope.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/random.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"
#include "../support/fixture.hpp"

namespace {

using namespace zamba;
using zamba::testing::normal_values, zamba::testing::PaddedMatrix, zamba::testing::relative_error,
    zamba::testing::Values;

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
  /// The fixtures are rounded to float, and their angles too; so are values in float.
  static constexpr double tolerance = sizeof(T) == 8 ? 2e-7 : 1e-6;
};

/// x turned forwards, or back.
template <class Where>
Values run(const Values& x, RopeShape shape, std::vector<Index> offsets, std::vector<Index> starts, bool back = false,
           Index padding = 0, int threads = 1) {
  using Device = typename Where::device;
  auto ctx = zamba::testing::new_context<Device>(threads);
  const Index rows = static_cast<Index>(starts.size()), tokens = offsets.back();
  const Sequences sequences{ctx.readable(offsets.data(), rows + 1), ctx.readable(starts.data(), rows), rows, tokens,
                            tokens};
  const PaddedMatrix<Device, typename Where::type> values(x, tokens, padding);
  if (back)
    rope_backward(ctx, shape, sequences, values.view());
  else
    rope(ctx, shape, sequences, values.view());
  return values.values();
}

TEST_CASE_TEMPLATE("rope agrees with the reference", Where, ZAMBA_TEST_ON) {
  const auto& fixture = zamba::testing::Fixture::operators();
  const RopeShape shape{3, 8, 10000};
  const std::vector<Index> offsets{0, 9, 18}, starts{0, 0};
  CHECK(relative_error(run<Where>(fixture.values("rope.in.x"), shape, offsets, starts), fixture.values("rope.out.y")) <
        Where::tolerance);
  CHECK(relative_error(run<Where>(fixture.values("rope.cotangent.y"), shape, offsets, starts, true),
                       fixture.values("rope.grad.x")) < Where::tolerance);
}

TEST_CASE_TEMPLATE("rope is its definition, for ragged rows with a past, and back gives x", Where, ZAMBA_TEST_ON) {
  const std::vector<Index> offsets{0, 3, 3, 40}, starts{0, 5, 100000};
  for (const Index head_dim : {2, 6, 32, 46}) {
    const RopeShape shape{2, head_dim, 500.0};
    const Values x = normal_values(40 * 2 * head_dim, 1), y = run<Where>(x, shape, offsets, starts);
    Values expected(x.size());
    for (Index t = 0; t < 40; ++t)
      for (Index head = 0; head < 2; ++head)
        for (Index i = 0; i < head_dim / 2; ++i) {
          const double position = static_cast<double>(t < 3 ? t : 100000 + t - 3);
          const double angle =
              position * std::pow(500.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
          const Index a = (t * 2 + head) * head_dim + i, b = a + head_dim / 2;
          expected[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
          expected[b] = x[b] * std::cos(angle) + x[a] * std::sin(angle);
        }
    CHECK(relative_error(y, expected) < Where::tolerance);
    CHECK(relative_error(run<Where>(y, shape, offsets, starts, true), x) < Where::tolerance);
  }
}

TEST_CASE_TEMPLATE("rope: splits, strides, threads and reruns change no bit", Where, ZAMBA_TEST_ON) {
  const RopeShape shape{3, 10, 10000};
  const Index tokens = 70, width = 30;
  const Values x = normal_values(tokens * width, 1), once = run<Where>(x, shape, {0, tokens}, {4});
  CHECK(run<Where>(x, shape, {0, tokens}, {4}) == once);
  CHECK(run<Where>(x, shape, {0, tokens}, {4}, false, 3, 2) == once);
  const Values left(x.begin(), x.begin() + 33 * width), right(x.begin() + 33 * width, x.end());
  Values both = run<Where>(left, shape, {0, 33}, {4});
  const Values second = run<Where>(right, shape, {0, tokens - 33}, {37});
  both.insert(both.end(), second.begin(), second.end());
  CHECK(both == once);
}

}  // namespace
