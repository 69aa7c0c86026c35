// SPDX-License-Identifier: MIT
#include <zamba/ops/selective_scan.hpp>

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
using zamba::testing::Array, zamba::testing::every, zamba::testing::finite_differences, zamba::testing::nans,
    zamba::testing::PaddedMatrix, zamba::testing::relative_error, zamba::testing::Values;

/// The inputs of one scan, in float64, contiguous.
struct Problem {
  Index rows = 1, heads = 1, channels = 12, states = 16;
  std::vector<Index> lengths, starts;
  Values u, delta, z, B, C, A_log, D, delta_bias, h0;  // h0 (rows, N, D)

  Index tokens() const {
    Index sum = 0;
    for (const Index length : lengths) sum += length;
    return sum;
  }
};

struct Result {
  Values y, h, d_u, d_delta, d_z, d_B, d_C, d_A_log, d_D, d_delta_bias, d_h0;
  Values kept;  // checkpoints, infinity where none was written: unlike NaN equal to itself
  bool operator==(const Result&) const = default;
};

/// Forward and, where cotangents are given, backward. What forward and backward assign is poisoned before. Rows of
/// activations are `padding` elements apart.
template <class Device, class T>
Result run(const Problem& p, bool with_state, const Values& d_y = {}, const Values& d_h = {}, int threads = 1,
           bool keep = true, Index padding = 0) {
  const Index tokens = p.tokens(), N = p.states, channels = p.channels;
  auto ctx = zamba::testing::new_context<Device>(threads);
  std::vector<Index> offsets{0};
  Index longest = 0;
  for (const Index length : p.lengths) {
    offsets.push_back(offsets.back() + length);
    longest = std::max(longest, length);
  }
  const Sequences sequences{ctx.readable(offsets.data(), p.rows + 1), ctx.readable(p.starts.data(), p.rows), p.rows,
                            tokens, longest};
  using A = PaddedMatrix<Device, T>;
  using F = compute_t<T>;
  const auto wide = [&](const Values& values) { return A::of_width(values, channels, padding); };
  const auto of_heads = [&](const Values& values) { return A::of_width(values, N, padding); };
  const auto in_heads = [&](const A& array) {
    return tokens > 0 ? array.parts(tokens) : Tensor<T, 3>(nullptr, 0, p.heads, N);
  };
  const A u = wide(p.u), delta = wide(p.delta), z = wide(p.z), B = of_heads(p.B), C = of_heads(p.C),
          y = wide(nans(p.u.size()));
  const Array<Device, F> A_log(p.A_log), D(p.D), bias(p.delta_bias), h(p.h0);
  const Array<Device, F> checkpoints(nans(static_cast<std::size_t>(scan_checkpoint_count(sequences) * N * channels)));
  const SelectiveScanInputs<T, F> in{u.view(),         delta.view(),       z.view(),
                                     in_heads(B),      in_heads(C),        A_log.view(channels, N),
                                     D.view(channels), bias.view(channels)};
  const Tensor<F, 3> state = with_state ? h.view(p.rows, N, channels) : Tensor<F, 3>{};
  const Tensor<F, 3> kept = checkpoints.view(scan_checkpoint_count(sequences), N, channels);
  selective_scan(ctx, in, sequences, state, y.view(), keep ? kept : Tensor<F, 3>{});
  Result result;
  result.y = y.values();
  result.h = h.values();
  result.kept = checkpoints.values();
  for (double& value : result.kept)
    if (std::isnan(value)) value = std::numeric_limits<double>::infinity();
  if constexpr (defines_backward<SelectiveScan<Device>>) {
    if (d_y.empty()) return result;
    const A dy = wide(d_y), d_u = wide(nans(p.u.size())), d_delta = wide(nans(p.u.size())),
            d_z = wide(nans(p.u.size())), d_B = of_heads(nans(p.B.size())), d_C = of_heads(nans(p.C.size()));
    const auto ones = [](std::size_t count) { return Values(count, 1.0); };  // what parameters' gradients are added to
    const Array<Device, F> dh(d_h), d_A_log(ones(p.A_log.size())), d_D(ones(p.D.size())), d_bias(ones(p.D.size()));
    const SelectiveScanGradients<T, F> gradients{d_u.view(),         d_delta.view(),       d_z.view(),
                                                 in_heads(d_B),      in_heads(d_C),        d_A_log.view(channels, N),
                                                 d_D.view(channels), d_bias.view(channels)};
    selective_scan_backward(ctx, dy.view(), in, sequences, kept, gradients,
                            with_state ? dh.view(p.rows, N, channels) : Tensor<F, 3>{});
    result = {result.y,     result.h,         d_u.values(), d_delta.values(), d_z.values(), d_B.values(),
              d_C.values(), d_A_log.values(), d_D.values(), d_bias.values(),  dh.values(),  result.kept};
    for (Values* values : {&result.d_A_log, &result.d_D, &result.d_delta_bias})
      for (double& value : *values) value -= 1;
  }
  return result;
}

/// (rows, channels, states) to (rows, states, channels) and back.
Values transposed(const Values& values, Index rows, Index from, Index to) {
  Values out(values.size());
  for (Index r = 0; r < rows; ++r)
    for (Index i = 0; i < from; ++i)
      for (Index j = 0; j < to; ++j) out[(r * to + j) * from + i] = values[(r * from + i) * to + j];
  return out;
}

Problem random_problem(std::vector<Index> lengths, std::vector<Index> starts, Index heads = 2, Index per_head = 21,
                       Index N = 5) {
  Problem p;
  p.rows = static_cast<Index>(lengths.size());
  p.heads = heads;
  p.channels = heads * per_head;
  p.states = N;
  p.lengths = std::move(lengths);
  p.starts = std::move(starts);
  Random random(Seed{3}, 0);
  const auto normal = [&](Index n, double scale = 1, double shift = 0) {
    Values values;
    for (Index i = 0; i < n; ++i) values.push_back(shift + scale * random.normal());
    return values;
  };
  const Index tokens = p.tokens();
  p.u = normal(tokens * p.channels);
  p.delta = normal(tokens * p.channels);
  p.z = normal(tokens * p.channels);
  p.B = normal(tokens * heads * N);
  p.C = normal(tokens * heads * N);
  p.A_log = normal(p.channels * N, 0.5);
  p.D = normal(p.channels);
  p.delta_bias = normal(p.channels, 1, -1);
  p.h0 = normal(p.rows * N * p.channels);
  return p;
}

/// The definition, one step after the other with std::exp.
Values plain_scan(const Problem& p) {
  Values y(p.u.size());
  const Index per_head = p.channels / p.heads;
  for (Index row = 0, begin = 0; row < p.rows; begin += p.lengths[row++])
    for (Index c = 0; c < p.channels; ++c) {
      Values s(static_cast<std::size_t>(p.states));
      for (Index n = 0; n < p.states; ++n) s[n] = p.starts[row] > 0 ? p.h0[(row * p.states + n) * p.channels + c] : 0;
      for (Index t = begin; t < begin + p.lengths[row]; ++t) {
        const Index at = t * p.channels + c;
        const double dt = std::log1p(std::exp(p.delta[at] + p.delta_bias[c]));
        double sum = p.D[c] * p.u[at];
        for (Index n = 0; n < p.states; ++n) {
          const Index bc = (t * p.heads + c / per_head) * p.states + n;
          s[n] = std::exp(-dt * std::exp(p.A_log[c * p.states + n])) * s[n] + dt * p.u[at] * p.B[bc];
          sum += s[n] * p.C[bc];
        }
        y[at] = sum * p.z[at] / (1 + std::exp(-p.z[at]));
      }
    }
  return y;
}

/// Normal numbers, cotangents of a problem's outputs.
Values cotangents(std::size_t count, std::uint64_t stream) {
  return zamba::testing::normal_values(static_cast<Index>(count), stream);
}

/// Every gradient by norm.
void check_gradients(const Result& got, const Result& wanted, double bound, double parameter_bound) {
  CHECK(relative_error(got.d_u, wanted.d_u) < bound);
  CHECK(relative_error(got.d_delta, wanted.d_delta) < bound);
  CHECK(relative_error(got.d_z, wanted.d_z) < bound);
  CHECK(relative_error(got.d_B, wanted.d_B) < bound);
  CHECK(relative_error(got.d_C, wanted.d_C) < bound);
  CHECK(relative_error(got.d_A_log, wanted.d_A_log) < parameter_bound);
  CHECK(relative_error(got.d_D, wanted.d_D) < parameter_bound);
  CHECK(relative_error(got.d_delta_bias, wanted.d_delta_bias) < parameter_bound);
  CHECK(relative_error(got.d_h0, wanted.d_h0) < parameter_bound);
}

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
  /// By norm. In double the fixtures' rounding to float, about 5e-8, remains; in float 37 steps of rounding at 6e-8.
  static constexpr double fixture = sizeof(T) == 8 ? 2e-7 : 2e-6;
  /// Against the definition in float64, over sequences of some hundred steps.
  static constexpr double definition = sizeof(T) == 8 ? 1e-13 : 2e-6;
};

TEST_CASE_TEMPLATE("selective_scan agrees with the reference", Where, ZAMBA_TEST_ON) {
  const auto& fixture = zamba::testing::Fixture::operators();
  const auto in = [&](const char* name) { return fixture.values(std::string("selective_scan.in.") + name); };
  const auto grad = [&](const char* name) { return fixture.values(std::string("selective_scan.grad.") + name); };
  Problem p;
  p.rows = 2;
  p.lengths = {37, 37};
  p.starts = {1, 1};
  p.u = in("u");
  p.delta = in("delta");
  p.z = in("z");
  p.B = in("b");
  p.C = in("c");
  p.D = in("d");
  p.delta_bias = in("delta_bias");
  const Values a = in("a");
  for (const double value : a) p.A_log.push_back(std::log(-value));
  p.h0 = transposed(in("h0"), 2, 12, 16);
  const Result result = run<typename Where::device, typename Where::type>(
      p, true, fixture.values("selective_scan.cotangent.y"),
      transposed(fixture.values("selective_scan.cotangent.h"), 2, 12, 16));
  CHECK(relative_error(result.y, fixture.values("selective_scan.out.y")) < Where::fixture);
  CHECK(relative_error(transposed(result.h, 2, 16, 12), fixture.values("selective_scan.out.h")) < Where::fixture);
  if (result.d_u.empty()) return;
  CHECK(relative_error(result.d_u, grad("u")) < Where::fixture);
  CHECK(relative_error(result.d_delta, grad("delta")) < Where::fixture);
  CHECK(relative_error(result.d_z, grad("z")) < Where::fixture);
  CHECK(relative_error(result.d_B, grad("b")) < Where::fixture);
  CHECK(relative_error(result.d_C, grad("c")) < Where::fixture);
  Values d_a = result.d_A_log;
  for (std::size_t i = 0; i < a.size(); ++i) d_a[i] /= a[i];
  CHECK(relative_error(d_a, grad("a")) < Where::fixture);
  CHECK(relative_error(result.d_D, grad("d")) < Where::fixture);
  CHECK(relative_error(result.d_delta_bias, grad("delta_bias")) < Where::fixture);
  CHECK(relative_error(transposed(result.d_h0, 2, 16, 12), grad("h0")) < Where::fixture);
}

TEST_CASE_TEMPLATE("selective_scan is its definition, for ragged rows longer than a chunk", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  for (const Index N : {1, 8, 16, 20, 33}) {
    Problem p = random_problem({5, 0, 64, 150, 1}, {0, 4, 2, 0, 7}, 2, 21, N);
    // Rows that begin at 0 must not read the state.
    for (Index i = 0; i < N * p.channels; ++i) p.h0[i] = p.h0[3 * N * p.channels + i] = std::nan("");
    const Result result = run<Device, T>(p, true);
    CHECK(relative_error(result.y, plain_scan(p)) < Where::definition);
    for (Index i = 0; i < N * p.channels; ++i)  // an empty row keeps its state
      REQUIRE(result.h[N * p.channels + i] == static_cast<T>(p.h0[N * p.channels + i]));
  }
}

TEST_CASE_TEMPLATE("selective_scan: every split of a sequence", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  const Index length = 70;
  const Problem whole = random_problem({length}, {0});
  const Result expected = run<Device, T>(whole, true);
  for (Index first = 1; first < length; ++first) {
    const auto part = [&](Index begin, Index count, const Values& h) {
      Problem p = whole;
      p.lengths = {count};
      p.starts = {begin};
      p.h0 = h;
      const auto cut = [&](Values& values) {
        const Index width = static_cast<Index>(values.size()) / length;
        values = Values(values.begin() + begin * width, values.begin() + (begin + count) * width);
      };
      for (Values* values : {&p.u, &p.delta, &p.z, &p.B, &p.C}) cut(*values);
      return run<Device, T>(p, true);
    };
    const Result left = part(0, first, nans(whole.h0.size()));
    const Result right = part(first, length - first, left.h);
    Values y = left.y;
    y.insert(y.end(), right.y.begin(), right.y.end());
    // The state is carried in the type it is computed in, so a cut changes no bit.
    REQUIRE(y == expected.y);
    REQUIRE(right.h == expected.h);
  }
}

TEST_CASE("selective_scan: finite differences, also through the states at both ends") {
  Problem p = random_problem({3, 66, 0}, {2, 0, 1}, 2, 3, 4);
  Random random(Seed{4}, 0);
  Values d_y(p.u.size()), d_h(p.h0.size());
  for (double& value : d_y) value = random.normal();
  for (double& value : d_h) value = random.normal();
  const Result result = run<cpu, double>(p, true, d_y, d_h);
  const auto value = [&] {
    const Result at = run<cpu, double>(p, true);
    double sum = 0;
    for (std::size_t i = 0; i < d_y.size(); ++i) sum += at.y[i] * d_y[i];
    for (std::size_t i = 0; i < d_h.size(); ++i) sum += at.h[i] * d_h[i];
    return sum;
  };
  const auto check = [&](const char* name, Values& values, const Values& gradient) {
    const std::size_t stride = 1 + values.size() / 40;
    CAPTURE(name);
    // Central differences at h = 1e-5: about h^2 times third derivatives, and 1e-16 / h of rounding.
    CHECK(relative_error(every(stride, gradient), finite_differences(values, 1e-5, value, stride)) < 1e-7);
  };
  check("u", p.u, result.d_u);
  check("delta", p.delta, result.d_delta);
  check("z", p.z, result.d_z);
  check("B", p.B, result.d_B);
  check("C", p.C, result.d_C);
  check("A_log", p.A_log, result.d_A_log);
  check("D", p.D, result.d_D);
  check("delta_bias", p.delta_bias, result.d_delta_bias);
  check("h0", p.h0, result.d_h0);
}

TEST_CASE_TEMPLATE("selective_scan: rows with gaps, forward and backward", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  for (const Index per_head : {6, 37}) {
    const Problem p = random_problem({70, 0, 3}, {2, 1, 0}, 2, per_head, 8);
    const Values d_y = cotangents(p.u.size(), 1), d_h = cotangents(p.h0.size(), 2);
    const Result together = run<cpu, double>(p, true, d_y, d_h);
    for (const Index padding : {1, 2}) {
      const Result apart = run<Device, T>(p, true, d_y, d_h, 1, true, padding);
      CHECK(relative_error(apart.y, together.y) < Where::definition);
      if (!apart.d_u.empty()) check_gradients(apart, together, Where::definition, Where::definition);
    }
  }
}

TEST_CASE_TEMPLATE("selective_scan: threads and reruns change no bit; a later token changes none before it", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  Problem p = random_problem({130, 3}, {0, 5}, 1, 150, 16);
  Values d_y(p.u.size(), 0.5), d_h(p.h0.size(), 0.25);
  const Result once = run<Device, T>(p, true, d_y, d_h);
  CHECK(run<Device, T>(p, true, d_y, d_h) == once);
  if constexpr (std::is_same_v<Device, cpu>) CHECK(run<Device, T>(p, true, d_y, d_h, 2) == once);
  const Index changed = 77;
  for (Index c = 0; c < p.channels; ++c) p.u[changed * p.channels + c] += 1;
  const Result other = run<Device, T>(p, true);
  for (Index i = 0; i < changed * p.channels; ++i) REQUIRE(other.y[i] == once.y[i]);
  CHECK(other.y[changed * p.channels] != once.y[changed * p.channels]);
}

}  // namespace
