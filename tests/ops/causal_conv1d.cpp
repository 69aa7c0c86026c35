// SPDX-License-Identifier: MIT
#include <zamba/ops/causal_conv1d.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/random.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"
#include "../support/fixture.hpp"

namespace {

using namespace zamba;
using zamba::testing::Array, zamba::testing::finite_differences, zamba::testing::relative_error, zamba::testing::Values;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
  /// Of one norm: the fixtures are rounded to float, and so is every sum of K + 1 terms in float.
  static constexpr double tolerance = sizeof(T) == 8 ? 2e-7 : 1e-6;
};

Values random_values(Index count, std::uint64_t stream) {
  Random random(Seed{11}, stream);
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) value = random.normal();
  return values;
}

Values part(const Values& values, Index first, Index count) {
  return {values.begin() + first, values.begin() + first + count};
}

Values joined(Values a, const Values& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// A batch and what it is convolved with.
struct Problem {
  Index channels = 0, width = 0;
  Values x, weight, bias, state, d_out, d_state;  // state and d_state empty: not given
  std::vector<Index> lengths, starts;
  Index padding = 0;  // NaNs between the rows of a matrix
  int threads = 1;
};

struct Result {
  Values out, state, d_x, d_weight, d_bias, d_state;
  bool operator==(const Result&) const = default;
};

/// Forward and, where the device has it, backward; gradients of parameters begin at zero.
template <class Device, class T>
Result run(const Problem& p) {
  using F = compute_t<T>;
  const Index D = p.channels, K = p.width, rows = static_cast<Index>(p.lengths.size());
  auto ctx = zamba::testing::new_context<Device>(p.threads);
  std::vector<Index> offsets(1, 0);
  for (const Index length : p.lengths) offsets.push_back(offsets.back() + length);
  const Index tokens = offsets.back();
  const Sequences sequences{ctx.readable(offsets.data(), rows + 1),
                            p.starts.empty() ? nullptr : ctx.readable(p.starts.data(), rows), rows, tokens,
                            *std::max_element(p.lengths.begin(), p.lengths.end())};
  // Matrices inside wider ones, as there may be no token.
  const Index stride = D + p.padding;
  const auto widened = [&](const Values& values) {
    Values wide(static_cast<std::size_t>(tokens * stride), nan);
    for (Index i = 0; i < tokens; ++i) std::copy_n(values.begin() + i * D, D, wide.begin() + i * stride);
    return Array<Device, T>(wide);
  };
  const auto matrix = [&](const Array<Device, T>& wide) { return wide.view(tokens, stride).columns(0, D); };
  const auto narrowed = [&](const Array<Device, T>& array) {
    Values values;
    const Values wide = array.values();
    for (Index i = 0; i < tokens; ++i)
      values.insert(values.end(), wide.begin() + i * stride, wide.begin() + i * stride + D);
    return values;
  };
  const auto x = widened(p.x), out = widened(Values(p.x.size(), nan));
  const Array<Device, F> weight(p.weight), bias(p.bias), state(p.state);
  const auto state_view = [&](const Array<Device, F>& states) {
    return p.state.empty() ? Tensor<F, 3>{} : states.view(rows, K - 1, D);
  };
  const Vector<F> bias_view = p.bias.empty() ? Vector<F>{} : bias.view(D);
  causal_conv1d(ctx, matrix(x), weight.view(D, K), bias_view, sequences, state_view(state), matrix(out));
  Result result;
  result.out = narrowed(out);
  result.state = state.values();
  if constexpr (defines_backward<CausalConv1d<Device>>) {
    const auto d_out = widened(p.d_out), d_x = widened(Values(p.x.size(), nan));
    const Array<Device, F> d_weight(Values(p.weight.size())), d_bias(Values(p.bias.size())), d_state(p.d_state),
        initial(p.state);
    causal_conv1d_backward(ctx, matrix(d_out), matrix(x), weight.view(D, K), bias_view, sequences, state_view(initial),
                           matrix(d_x), d_weight.view(D, K), p.bias.empty() ? Vector<F>{} : d_bias.view(D),
                           p.d_state.empty() ? Tensor<F, 3>{} : d_state.view(rows, K - 1, D));
    result.d_x = narrowed(d_x);
    result.d_weight = d_weight.values();
    result.d_bias = d_bias.values();
    result.d_state = d_state.values();
  }
  return result;
}

/// Rows of the given lengths and starts, with everything random.
Problem random_problem(Index channels, Index width, std::vector<Index> lengths, std::vector<Index> starts) {
  const Index tokens = std::accumulate(lengths.begin(), lengths.end(), Index{0});
  const Index states = static_cast<Index>(lengths.size()) * (width - 1) * channels;
  return {.channels = channels,
          .width = width,
          .x = random_values(tokens * channels, 1),
          .weight = random_values(channels * width, 2),
          .bias = random_values(channels, 3),
          .state = random_values(states, 4),
          .d_out = random_values(tokens * channels, 5),
          .d_state = random_values(states, 6),
          .lengths = std::move(lengths),
          .starts = std::move(starts)};
}

TEST_CASE_TEMPLATE("causal_conv1d agrees with the reference", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const auto& fixture = zamba::testing::Fixture::operators();
  const auto in = [&](const char* name) { return fixture.values(std::string("causal_conv1d_silu.") + name); };
  const Result result = run<Device, T>({.channels = 10,
                                        .width = 4,
                                        .x = in("in.x"),
                                        .weight = in("in.weight"),
                                        .bias = in("in.bias"),
                                        .state = {},
                                        .d_out = in("cotangent.y"),
                                        .d_state = {},
                                        .lengths = {11, 11},
                                        .starts = {}});
  CHECK(relative_error(result.out, in("out.y")) < Where::tolerance);
  if constexpr (!defines_backward<CausalConv1d<Device>>) return;
  CHECK(relative_error(result.d_x, in("grad.x")) < Where::tolerance);
  CHECK(relative_error(result.d_weight, in("grad.weight")) < Where::tolerance);
  CHECK(relative_error(result.d_bias, in("grad.bias")) < Where::tolerance);
}

TEST_CASE("causal_conv1d: finite differences, through the states") {
  for (const Index width : {1, 2, 4, 5}) {
    CAPTURE(width);
    // Rows shorter and longer than the window, with and without a past, and one without tokens.
    Problem problem = random_problem(3, width, {5, 2, 0, 1, 3}, {9, 2, 4, 7, 0});
    const auto loss = [&] {
      const Result result = run<cpu, double>(problem);
      return std::inner_product(result.out.begin(), result.out.end(), problem.d_out.begin(), 0.0) +
             std::inner_product(result.state.begin(), result.state.end(), problem.d_state.begin(), 0.0);
    };
    const auto numeric = [&](Values& values) { return finite_differences(values, 1e-5, loss); };
    const Result result = run<cpu, double>(problem);
    // Central differences: step^2 = 1e-10 of curvature, 1e-16 / step = 1e-11 of rounding.
    CHECK(relative_error(result.d_x, numeric(problem.x)) < 1e-8);
    CHECK(relative_error(result.d_weight, numeric(problem.weight)) < 1e-8);
    CHECK(relative_error(result.d_bias, numeric(problem.bias)) < 1e-8);
    if (width > 1) CHECK(relative_error(result.d_state, numeric(problem.state)) < 1e-8);
  }
}

TEST_CASE_TEMPLATE("causal_conv1d adds to d_weight and d_bias", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  if constexpr (defines_backward<CausalConv1d<Device>>) {
    auto ctx = zamba::testing::new_context<Device>(1);
    const Index lengths[] = {0, 3}, starts[] = {0};
    const Sequences sequences{ctx.readable(lengths, 2), ctx.readable(starts, 1), 1, 3, 3};
    for (const Index K : {2, 4}) {
      const Array<Device, T> x({1, 2, 3, 4, 5, 6}), d_x(Values(6));
      const Array<Device, compute_t<T>> weight(random_values(2 * K, 1));
      const auto added = [&](int times) {
        const Array<Device, compute_t<T>> d_weight(Values(static_cast<std::size_t>(2 * K))), d_bias(Values(2));
        for (int i = 0; i < times; ++i)
          causal_conv1d_backward(ctx, x.view(3, 2), x.view(3, 2), weight.view(2, K), {}, sequences, {}, d_x.view(3, 2),
                                 d_weight.view(2, K), d_bias.view(2), {});
        return joined(d_weight.values(), d_bias.values());
      };
      Values twice = added(1);
      CHECK(twice.back() != 0);
      for (double& value : twice) value *= 2;
      CHECK(added(2) == twice);
    }
  }
}

/// What the chunks of a row give one after the other, states and their gradients handed on.
template <class Device, class T>
Result chunked(const Problem& whole, const std::vector<Index>& lengths) {
  const Index D = whole.channels;
  Result all;
  std::vector<Problem> chunks;
  Index first = 0, start = whole.starts[0];
  for (const Index length : lengths) {
    Problem chunk = whole;
    chunk.x = part(whole.x, first * D, length * D);
    chunk.d_out = part(whole.d_out, first * D, length * D);
    chunk.lengths = {length};
    chunk.starts = {start + first};
    chunk.state = chunks.empty() ? whole.state : all.state;
    chunks.push_back(chunk);
    const Result result = run<Device, T>(chunk);
    all.out = joined(all.out, result.out);
    all.state = result.state;
    first += length;
  }
  if constexpr (!defines_backward<CausalConv1d<Device>>) return all;
  all.d_state = whole.d_state;
  all.d_weight.assign(whole.weight.size(), 0);
  all.d_bias.assign(whole.bias.size(), 0);
  for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
    chunk->d_state = all.d_state;
    const Result result = run<Device, T>(*chunk);
    all.d_x = joined(result.d_x, all.d_x);
    all.d_state = result.d_state;
    for (std::size_t i = 0; i < all.d_weight.size(); ++i) all.d_weight[i] += result.d_weight[i];
    for (std::size_t i = 0; i < all.d_bias.size(); ++i) all.d_bias[i] += result.d_bias[i];
  }
  return all;
}

TEST_CASE_TEMPLATE("causal_conv1d: every split of a sequence gives the same", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Index length = 13;
  for (const Index width : {2, 4})
    for (const Index start : {0, 20}) {
      const Problem problem = random_problem(6, width, {length}, {start});
      const Result whole = run<Device, T>(problem);
      for (Index first = 1; first < length; ++first)
        for (Index second = 0; first + second < length; ++second) {
          CAPTURE(first);
          CAPTURE(second);
          const Result parts = chunked<Device, T>(problem, {first, second, length - first - second});
          CHECK(parts.out == whole.out);
          CHECK(parts.state == whole.state);
          if constexpr (!defines_backward<CausalConv1d<Device>>) continue;
          CHECK(relative_error(parts.d_x, whole.d_x) < Where::tolerance);  // the sum over j is split
          CHECK(relative_error(parts.d_weight, whole.d_weight) < Where::tolerance);
          CHECK(relative_error(parts.d_bias, whole.d_bias) < Where::tolerance);
          if (start > 0)
            CHECK(relative_error(parts.d_state, whole.d_state) < Where::tolerance);
          else
            CHECK(std::all_of(parts.d_state.begin(), parts.d_state.end(), [](double d) { return d == 0; }));
        }
    }
}

TEST_CASE_TEMPLATE("causal_conv1d: a ragged batch equals each row alone", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Index D = 33, K = 4, past = (K - 1) * D;
  const Problem batch = random_problem(D, K, {0, 5, 70, 0, 1, 130, 0}, {3, 0, 6, 0, 8, 0, 1});
  const Result together = run<Device, T>(batch);
  Values d_weight(batch.weight.size());
  Index first = 0;
  for (std::size_t row = 0; row < batch.lengths.size(); ++row) {
    const Index length = batch.lengths[row];
    Problem alone = batch;
    alone.lengths = {length};
    alone.starts = {batch.starts[row]};
    alone.x = part(batch.x, first * D, length * D);
    alone.d_out = part(batch.d_out, first * D, length * D);
    alone.state = part(batch.state, static_cast<Index>(row) * past, past);
    alone.d_state = part(batch.d_state, static_cast<Index>(row) * past, past);
    const Result result = run<Device, T>(alone);
    CHECK(result.out == part(together.out, first * D, length * D));
    CHECK(result.state == part(together.state, static_cast<Index>(row) * past, past));
    if constexpr (defines_backward<CausalConv1d<Device>>) {
      CHECK(result.d_x == part(together.d_x, first * D, length * D));
      CHECK(result.d_state == part(together.d_state, static_cast<Index>(row) * past, past));
      for (std::size_t i = 0; i < d_weight.size(); ++i) d_weight[i] += result.d_weight[i];
    }
    first += length;
  }
  if constexpr (defines_backward<CausalConv1d<Device>>)
    CHECK(relative_error(together.d_weight, d_weight) < Where::tolerance);
}

TEST_CASE_TEMPLATE("causal_conv1d never reads the state of a row without a past", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  Problem problem = random_problem(18, 4, {2, 9, 0}, {0, 0, 0});
  std::fill(problem.state.begin(), problem.state.end(), 0.0);
  const Result clean = run<Device, T>(problem);
  std::fill(problem.state.begin(), problem.state.end(), nan);
  const Result poisoned = run<Device, T>(problem);
  const Index given = 2 * 3 * 18;  // the states of the rows with tokens
  CHECK(poisoned.out == clean.out);
  CHECK(part(poisoned.state, 0, given) == part(clean.state, 0, given));
  CHECK(std::isnan(poisoned.state.back()));  // a row without tokens leaves its state as it is
  CHECK(poisoned.d_x == clean.d_x);
  CHECK(poisoned.d_weight == clean.d_weight);
  CHECK(poisoned.d_state == clean.d_state);
}

TEST_CASE_TEMPLATE("causal_conv1d: an output depends on no later input", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Index D = 17, length = 75;
  Problem problem = random_problem(D, 4, {length}, {5});
  const Result before = run<Device, T>(problem);
  for (const Index at : {0, 1, 40, 64, 74}) {
    Problem changed = problem;
    for (Index c = 0; c < D; ++c) changed.x[static_cast<std::size_t>(at * D + c)] += 1;
    const Result after = run<Device, T>(changed);
    CHECK(part(after.out, 0, at * D) == part(before.out, 0, at * D));
    CHECK(part(after.out, at * D, D) != part(before.out, at * D, D));
  }
}

TEST_CASE_TEMPLATE("causal_conv1d: strides, threads and reruns change no bit", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  for (const Index width : {3, 4}) {
    Problem problem = random_problem(530, width, {200, 0, 3}, {0, 2, 8});  // more channels than one tile
    const Result once = run<Device, T>(problem);
    CHECK(run<Device, T>(problem) == once);
    problem.padding = 5;
    CHECK(run<Device, T>(problem) == once);
    problem.threads = 2;
    CHECK(run<Device, T>(problem) == once);
    problem.bias.assign(530, 0.0);
    const Result zero_bias = run<Device, T>(problem);
    problem.bias.clear();
    CHECK(run<Device, T>(problem).out == zero_bias.out);
    CHECK(run<Device, T>(problem).d_x == zero_bias.d_x);
  }
}

}  // namespace
