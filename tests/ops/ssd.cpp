// SPDX-License-Identifier: MIT
#include <zamba/ops/ssd.hpp>

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
    zamba::testing::relative_error, zamba::testing::Values;

/// The inputs of one ssd, in float64, contiguous.
struct Problem {
  Index rows = 1, groups = 2, heads = 6, per_head = 8, states = 16;
  std::vector<Index> lengths, starts;
  Values u, delta, B, C, A_log, D, dt_bias, h0;  // h0 (rows, N, D)
  double dt_min = 0;

  Index channels() const { return heads * per_head; }
  Index tokens() const {
    Index sum = 0;
    for (const Index length : lengths) sum += length;
    return sum;
  }
};

struct Result {
  Values y, h, d_u, d_delta, d_B, d_C, d_A_log, d_D, d_dt_bias, d_h0;
  Values kept;  // checkpoints, infinity where none was written: unlike NaN equal to itself
  bool operator==(const Result&) const = default;
};

/// Forward and, where cotangents are given, backward. What forward and backward assign is poisoned before.
template <class Device, class T>
Result run(const Problem& p, bool with_state, const Values& d_y = {}, const Values& d_h = {}, int threads = 1,
           Index chunk = ssd_chunk) {
  const Index tokens = p.tokens(), N = p.states, D = p.channels(), H = p.heads, G = p.groups;
  auto ctx = zamba::testing::new_context<Device>(threads);
  std::vector<Index> offsets{0};
  Index longest = 0;
  for (const Index length : p.lengths) {
    offsets.push_back(offsets.back() + length);
    longest = std::max(longest, length);
  }
  const Sequences sequences{ctx.readable(offsets.data(), p.rows + 1), ctx.readable(p.starts.data(), p.rows), p.rows,
                            tokens, longest};
  using A = Array<Device, T>;
  using F = compute_t<T>;
  const A u(p.u), delta(p.delta), B(p.B), C(p.C), y(nans(p.u.size()));
  const Array<Device, F> A_log(p.A_log), skip(p.D), bias(p.dt_bias), h(p.h0);
  const Index kept_states = ssd_checkpoint_count(sequences, chunk);
  const Array<Device, F> checkpoints(nans(static_cast<std::size_t>(kept_states * N * D)));
  const SsdInputs<T, F> in{u.view(tokens, D), delta.view(tokens, H), B.view(tokens, G, N), C.view(tokens, G, N),
                           A_log.view(H),     skip.view(H),          bias.view(H),         p.dt_min};
  const Tensor<F, 3> state = with_state ? h.view(p.rows, N, D) : Tensor<F, 3>{},
                     kept = checkpoints.view(kept_states, N, D);
  ssd(ctx, in, sequences, state, y.view(tokens, D), kept, chunk);
  Result result;
  result.y = y.values();
  result.h = h.values();
  result.kept = checkpoints.values();
  for (double& value : result.kept)
    if (std::isnan(value)) value = std::numeric_limits<double>::infinity();
  if constexpr (defines_backward<Ssd<Device>>) {
    if (d_y.empty()) return result;
    const A dy(d_y), d_u(nans(p.u.size())), d_delta(nans(p.delta.size())), d_B(nans(p.B.size())), d_C(nans(p.C.size()));
    const Array<Device, F> dh(d_h), d_A_log(Values(p.A_log.size())), d_D(Values(p.D.size())),
        d_bias(Values(p.D.size()));
    const SsdGradients<T, F> gradients{d_u.view(tokens, D),    d_delta.view(tokens, H), d_B.view(tokens, G, N),
                                       d_C.view(tokens, G, N), d_A_log.view(H),         d_D.view(H),
                                       d_bias.view(H)};
    ssd_backward(ctx, dy.view(tokens, D), in, sequences, kept, gradients,
                 with_state ? dh.view(p.rows, N, D) : Tensor<F, 3>{}, chunk);
    result = {result.y,         result.h,     d_u.values(),    d_delta.values(), d_B.values(), d_C.values(),
              d_A_log.values(), d_D.values(), d_bias.values(), dh.values(),      result.kept};
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

Problem random_problem(std::vector<Index> lengths, std::vector<Index> starts, Index groups = 2, Index heads = 6,
                       Index per_head = 7, Index N = 5) {
  Problem p;
  p.rows = static_cast<Index>(lengths.size());
  p.groups = groups;
  p.heads = heads;
  p.per_head = per_head;
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
  p.u = normal(tokens * p.channels());
  p.delta = normal(tokens * heads);
  p.B = normal(tokens * groups * N);
  p.C = normal(tokens * groups * N);
  p.A_log = normal(heads, 0.5);
  p.D = normal(heads);
  p.dt_bias = normal(heads, 1, -1);
  p.h0 = normal(p.rows * N * p.channels());
  return p;
}

/// The definition, one step after the other with std::exp.
Values plain_ssd(const Problem& p) {
  Values y(p.u.size());
  for (Index row = 0, begin = 0; row < p.rows; begin += p.lengths[row++])
    for (Index c = 0; c < p.channels(); ++c) {
      const Index head = c / p.per_head, group = head / (p.heads / p.groups);
      Values s(static_cast<std::size_t>(p.states));
      for (Index n = 0; n < p.states; ++n) s[n] = p.starts[row] > 0 ? p.h0[(row * p.states + n) * p.channels() + c] : 0;
      for (Index t = begin; t < begin + p.lengths[row]; ++t) {
        const double dt = std::max(p.dt_min, std::log1p(std::exp(p.delta[t * p.heads + head] + p.dt_bias[head])));
        const double u = p.u[t * p.channels() + c];
        double sum = p.D[head] * u;
        for (Index n = 0; n < p.states; ++n) {
          const Index bc = (t * p.groups + group) * p.states + n;
          s[n] = std::exp(-dt * std::exp(p.A_log[head])) * s[n] + dt * u * p.B[bc];
          sum += s[n] * p.C[bc];
        }
        y[t * p.channels() + c] = sum;
      }
    }
  return y;
}

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
  /// By norm. In double the fixtures' rounding to float, about 5e-8, remains; in float 37 steps of rounding at 6e-8.
  static constexpr double fixture = sizeof(T) == 8 ? 2e-7 : 2e-6;
  /// A gradient has gone through them forwards and backwards.
  static constexpr double gradient = sizeof(T) == 8 ? 2e-7 : 2 * fixture;
  /// Against the definition in float64, over sequences of some hundred steps; and between two orders of the same sums.
  static constexpr double definition = sizeof(T) == 8 ? 1e-13 : 2e-6;
};

TEST_CASE_TEMPLATE("ssd agrees with the reference", Where, ZAMBA_TEST_ON) {
  const auto& fixture = zamba::testing::Fixture::operators();
  const auto in = [&](const char* name) { return fixture.values(std::string("ssd.in.") + name); };
  const auto grad = [&](const char* name) { return fixture.values(std::string("ssd.grad.") + name); };
  Problem p;
  p.rows = 2;
  p.lengths = {37, 37};
  p.starts = {1, 1};
  p.u = in("x");
  p.delta = in("dt");
  p.B = in("b");
  p.C = in("c");
  p.D = in("d");
  p.dt_bias = in("dt_bias");
  const Values a = in("a");
  for (const double value : a) p.A_log.push_back(std::log(-value));
  p.h0 = transposed(in("h0"), 2, 48, 16);
  for (const Index chunk : {16, 64}) {
    const Result result = run<typename Where::device, typename Where::type>(
        p, true, fixture.values("ssd.cotangent.y"), transposed(fixture.values("ssd.cotangent.h"), 2, 48, 16), 1, chunk);
    CHECK(relative_error(result.y, fixture.values("ssd.out.y")) < Where::fixture);
    CHECK(relative_error(transposed(result.h, 2, 16, 48), fixture.values("ssd.out.h")) < Where::fixture);
    if (result.d_u.empty()) continue;
    CHECK(relative_error(result.d_u, grad("x")) < Where::gradient);
    CHECK(relative_error(result.d_delta, grad("dt")) < Where::gradient);
    CHECK(relative_error(result.d_B, grad("b")) < Where::gradient);
    CHECK(relative_error(result.d_C, grad("c")) < Where::gradient);
    Values d_a = result.d_A_log;
    for (std::size_t i = 0; i < a.size(); ++i) d_a[i] /= a[i];
    CHECK(relative_error(d_a, grad("a")) < Where::gradient);
    CHECK(relative_error(result.d_D, grad("d")) < Where::gradient);
    CHECK(relative_error(result.d_dt_bias, grad("dt_bias")) < Where::gradient);
    CHECK(relative_error(transposed(result.d_h0, 2, 16, 48), grad("h0")) < Where::gradient);
  }
}

TEST_CASE_TEMPLATE("ssd is its definition, for ragged rows, whatever the chunk", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  for (const Index N : {1, 8, 33})
    for (const Index per_head : {1, 7, 32, 100}) {
      Problem p = random_problem({5, 0, 64, 150, 1}, {0, 4, 2, 0, 7}, 2, 6, per_head, N);
      // Rows that begin at 0 must not read the state.
      const Index size = N * p.channels();
      for (Index i = 0; i < size; ++i) p.h0[i] = p.h0[3 * size + i] = std::nan("");
      const Values expected = plain_ssd(p);
      for (const Index chunk : {1, 3, 5, 16, 64, 200}) {
        const Result result = run<Device, T>(p, true, {}, {}, 1, chunk);
        CHECK(relative_error(result.y, expected) < Where::definition);
        for (Index i = 0; i < size; ++i)  // an empty row keeps its state
          REQUIRE(result.h[size + i] == static_cast<T>(p.h0[size + i]));
      }
    }
}

TEST_CASE_TEMPLATE("ssd: strong decays, and weak ones after them in the same chunk", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  Problem p = random_problem({64}, {3});
  for (double& value : p.A_log) value += 2.5;  // A near -12
  for (Index t = 0; t < 64; ++t)
    for (Index h = 0; h < p.heads; ++h) p.delta[t * p.heads + h] += t < 40 ? 12 : -6;
  // 40 decays near e^-150, then some near 1: logarithms that add up to 6000 would leave no digits for the latter.
  Values expected = plain_ssd(p), y = run<Device, T>(p, true).y;
  const Index weak = 40 * p.channels();
  CHECK(relative_error(Values(y.begin() + weak, y.end()), Values(expected.begin() + weak, expected.end())) <
        Where::definition);
  CHECK(relative_error(y, expected) < Where::definition);
}

TEST_CASE_TEMPLATE("ssd: gradients do not depend on the chunk", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  if constexpr (defines_backward<Ssd<Device>>) {
    const Problem p = random_problem({90, 1, 33}, {3, 0, 0});
    Values d_y(p.u.size(), 0.5), d_h(p.h0.size(), 0.25);
    const Result expected = run<Device, T>(p, true, d_y, d_h, 1, 64);
    for (const Index chunk : {1, 2, 7, 32, 100}) {
      const Result result = run<Device, T>(p, true, d_y, d_h, 1, chunk);
      for (const auto member : {&Result::d_u, &Result::d_delta, &Result::d_B, &Result::d_C, &Result::d_A_log,
                                &Result::d_D, &Result::d_dt_bias, &Result::d_h0})
        CHECK(relative_error(result.*member, expected.*member) < 10 * Where::definition);
    }
  }
}

TEST_CASE_TEMPLATE("ssd: every split of a sequence", Where, ZAMBA_TEST_ON) {
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
      for (Values* values : {&p.u, &p.delta, &p.B, &p.C}) cut(*values);
      return run<Device, T>(p, true);
    };
    const Result left = part(0, first, nans(whole.h0.size()));
    const Result right = part(first, length - first, left.h);
    Values y = left.y;
    y.insert(y.end(), right.y.begin(), right.y.end());
    REQUIRE(relative_error(y, expected.y) < Where::definition);
    REQUIRE(relative_error(right.h, expected.h) < Where::definition);
  }
}

TEST_CASE("ssd: finite differences, also through the states at both ends and the limit of dt") {
  for (const double dt_min : {0.0, 0.3}) {
    Problem p = random_problem({3, 70, 0}, {2, 0, 1}, 1, 3, 3, 4);
    p.dt_min = dt_min;
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
    check("B", p.B, result.d_B);
    check("C", p.C, result.d_C);
    check("A_log", p.A_log, result.d_A_log);
    check("D", p.D, result.d_D);
    check("dt_bias", p.dt_bias, result.d_dt_bias);
    check("h0", p.h0, result.d_h0);
  }
}

TEST_CASE_TEMPLATE("ssd: threads and reruns change no bit; a later token changes none before it", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  Problem p = random_problem({130, 3}, {0, 5}, 1, 10, 40, 16);
  Values d_y(p.u.size(), 0.5), d_h(p.h0.size(), 0.25);
  const Result once = run<Device, T>(p, true, d_y, d_h);
  CHECK(run<Device, T>(p, true, d_y, d_h) == once);
  if constexpr (std::is_same_v<Device, cpu>) CHECK(run<Device, T>(p, true, d_y, d_h, 2) == once);
  const Index changed = 77;
  for (Index c = 0; c < p.channels(); ++c) p.u[changed * p.channels() + c] += 1;
  const Result other = run<Device, T>(p, true);
  for (Index i = 0; i < changed * p.channels(); ++i) REQUIRE(other.y[i] == once.y[i]);
  CHECK(other.y[changed * p.channels()] != once.y[changed * p.channels()]);
}

}  // namespace
