// SPDX-License-Identifier: MIT
// Tensors of more than 2^31 elements: what lies at their ends is read and written there. Each test needs some of the
// GPU's memory, and says so where that much is not free.
#include <zamba/ops/attention.cuh>
#include <zamba/ops/causal_conv1d.cuh>
#include <zamba/ops/embedding.cuh>
#include <zamba/ops/linear.cuh>
#include <zamba/ops/rms_norm.cuh>
#include <zamba/ops/selective_scan.cuh>
#include <zamba/ops/ssd.cuh>

#include <doctest/doctest.h>

#include "../support/arrays.hpp"

namespace {

using namespace zamba;
using zamba::testing::Array, zamba::testing::normal_values, zamba::testing::relative_error, zamba::testing::Values;

constexpr Index limit = Index{1} << 31;
/// Of results in bf16, by norm: an element is off by at most 2^-9 of itself where it is written, and by less where
/// float sums differ in their order.
constexpr double tolerance = 0x1p-8;

/// Whether so many elements of T fit, with a gigabyte to spare.
template <class T>
bool fits(Index elements) {
  std::size_t available = 0, total = 0;
  zamba::kernel::check_cuda(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  const auto wanted = static_cast<std::size_t>(elements) * sizeof(T);
  if (wanted + (std::size_t{1} << 30) <= available) return true;
  MESSAGE("skipped: ", wanted, " bytes wanted, ", available, " are free");
  return false;
}

/// Elements in memory of their own: an arena that held them would grow by as much again.
template <class T>
class Large {
 public:
  explicit Large(Index elements) : buffer_(static_cast<std::size_t>(elements) * sizeof(T)) {}

  template <class... Extents>
  Tensor<T, sizeof...(Extents)> view(Extents... extents) const {
    return {reinterpret_cast<T*>(buffer_.data()), extents...};
  }

 private:
  Buffer<cuda> buffer_;
};

/// As stored.
Values rounded(Values values) {
  for (double& value : values) value = bf16(static_cast<float>(value));
  return values;
}

template <class T>
void write(Vector<T> to, const Values& values) {
  std::vector<T> stored;
  for (const double value : values) stored.push_back(static_cast<T>(static_cast<float>(value)));
  Memory<cuda>::copy_from_host(to.data, stored.data(), stored.size() * sizeof(T));
}

template <class T>
Values read(Vector<T> from) {
  std::vector<std::remove_const_t<T>> stored(static_cast<std::size_t>(from.size()));
  Memory<cuda>::copy_to_host(stored.data(), from.data, stored.size() * sizeof(T));
  return {stored.begin(), stored.end()};
}

/// Rows of equal length.
class Rows {
 public:
  Rows(Context<cuda>& ctx, Index rows, Index length, const std::vector<Index>& starts) {
    std::vector<Index> offsets;
    for (Index row = 0; row <= rows; ++row) offsets.push_back(row * length);
    sequences_ = {ctx.readable(offsets.data(), rows + 1), ctx.readable(starts.data(), rows), rows, rows * length,
                  length};
  }
  operator const Sequences&() const { return sequences_; }

 private:
  Sequences sequences_;
};

}  // namespace

TEST_CASE("offsets beyond 2^31: attention over the end of a long cache, and over the last of several rows") {
  const Index width = 128, positions = limit / width + 72;  // of one row
  const Index of_three = (limit / width / 2 + 40);          // of each of three: the last one begins beyond 2^31
  if (!fits<bf16>(2 * 3 * of_three * width)) return;
  Context<cuda> ctx;
  const Index elements = 3 * of_three * width;
  REQUIRE(positions * width <= elements);
  const Large<bf16> k(elements), v(elements);
  ctx.zero(k.view(elements));
  ctx.zero(v.view(elements));
  const AttentionShape shape{2, 1, width, 1};
  // A query meets one key with a score of 256, all others with 0: their weight is 2^24 exp(-256), which is nothing.
  Values direction(static_cast<std::size_t>(width));
  direction[5] = 16;
  const Values value = rounded(normal_values(width, 1));

  const auto attends_to = [&](Tensor<bf16, 3> cache_k, Tensor<bf16, 3> cache_v, Index row, Index position,
                              const std::vector<Index>& starts, Index length) {
    CAPTURE(position);
    CAPTURE(length);
    const Index rows = cache_k.shape[0], tokens = rows * length;
    write(cache_k[row][position], direction);
    write(cache_v[row][position], value);
    ArenaScope scope(ctx.arena());
    const auto q = ctx.arena().tensor<bf16>(tokens, 2 * width), out = ctx.arena().tensor<bf16>(tokens, 2 * width);
    const auto own = ctx.arena().tensor<bf16>(tokens, width);
    const auto lse = ctx.arena().tensor<float>(tokens, 2);
    ctx.zero(q);
    ctx.fill(own, bf16(0.25f));
    Vector<bf16> last = q[row * length + length - 1];
    write(last.slice(width, width), direction);  // of the second head
    attention(ctx, shape, q, own, own, Rows(ctx, rows, length, starts), cache_k, cache_v, out, lse);
    CHECK(relative_error(read(out[row * length + length - 1].slice(width, width)), value) <= tolerance);
    // The tokens' own keys are behind the past.
    CHECK(read(cache_k[row][starts[static_cast<std::size_t>(row)] + length - 1]) ==
          Values(static_cast<std::size_t>(width), 0.25));
    ctx.zero(cache_k[row][position]);
    ctx.zero(cache_v[row][position]);
  };
  {
    const auto cache_k = k.view(1, positions, width), cache_v = v.view(1, positions, width);
    attends_to(cache_k, cache_v, 0, positions - 9, {positions - 1}, 1);
    attends_to(cache_k, cache_v, 0, positions - 66, {positions - 65}, 64);
  }
  const auto cache_k = k.view(3, of_three, width), cache_v = v.view(3, of_three, width);
  REQUIRE(&cache_k(2, 0, 0) - cache_k.data >= limit);
  for (const Index length : {1, 64}) attends_to(cache_k, cache_v, 2, 6, {5, 0, 9}, length);
}

TEST_CASE("offsets beyond 2^31: linear, of a weight") {
  const Index in = 16400, out = limit / in + 100;
  if (!fits<bf16>(in * out)) return;
  Context<cuda> ctx;
  const Large<bf16> weight_(in * out);
  const auto weight = weight_.view(out, in);
  const Values row = rounded(normal_values(in, 2));
  ctx.fill(weight, bf16(0x1p-6f));
  write(weight[out - 1], row);
  for (const Index n : {1, 8, 40, 100}) {  // each of the ways that linear takes
    CAPTURE(n);
    const Values x = rounded(normal_values(n * in, 3));
    const Array<cuda, bf16> x_(x), y_(Values(static_cast<std::size_t>(n * out)));
    const auto y = y_.view(n, out);
    linear(ctx, x_.view(n, in), weight, y);
    Values sums, ends, wanted_sums, wanted_ends;
    for (Index t = 0; t < n; ++t) {
      double sum = 0, end = 0;
      for (Index i = 0; i < in; ++i) {
        sum += 0x1p-6 * x[static_cast<std::size_t>(t * in + i)];
        end += row[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(t * in + i)];
      }
      wanted_sums.push_back(sum);
      wanted_ends.push_back(end);
      sums.push_back(read(y[t].slice(0, 1))[0]);
      ends.push_back(read(y[t].slice(out - 1, 1))[0]);
    }
    CHECK(relative_error(sums, wanted_sums) <= tolerance);
    CHECK(relative_error(ends, wanted_ends) <= tolerance);
  }
}

TEST_CASE("offsets beyond 2^31: linear, of outputs") {
  const Index n = 65600, out = limit / n + 8, in = 16;
  if (!fits<bf16>(n * out)) return;
  Context<cuda> ctx;
  const Values x = rounded(normal_values(n * in, 4)), weight = rounded(normal_values(out * in, 5)),
               bias = normal_values(out, 6);
  const Array<cuda, bf16> x_(x), weight_(weight);
  const Array<cuda, float> bias_(bias);
  const Large<bf16> y_(n * out);
  const auto y = y_.view(n, out);
  linear(ctx, x_.view(n, in), weight_.view(out, in), y, {}, bias_.view(out));
  for (const Index t : {Index{0}, n / 2, n - 1}) {
    Values wanted;
    for (Index o = 0; o < out; ++o) {
      double sum = bias[static_cast<std::size_t>(o)];
      for (Index i = 0; i < in; ++i)
        sum += x[static_cast<std::size_t>(t * in + i)] * weight[static_cast<std::size_t>(o * in + i)];
      wanted.push_back(sum);
    }
    CHECK(relative_error(read(y[t]), wanted) <= tolerance);  // the sum is rounded before the bias is added
  }
}

TEST_CASE("offsets beyond 2^31: embedding, rms_norm and causal_conv1d") {
  const Index d = 8200, n = limit / d + 64;
  if (!fits<bf16>(2 * n * d)) return;
  Context<cuda> ctx;
  const Large<bf16> x_(n * d), out_(n * d);
  const auto x = x_.view(n, d), out = out_.view(n, d);
  const Values last = rounded(normal_values(d, 7)), ones(static_cast<std::size_t>(d), 1);
  ctx.fill(x, bf16(1));
  write(x[n - 1], last);

  const Array<cuda, Token> tokens(Values{0, static_cast<double>(n - 1)});
  embedding(ctx, tokens.view(2).data, 2, x, out.slice(0, 2));
  CHECK(read(out[0]) == ones);
  CHECK(read(out[1]) == last);

  const Array<cuda, float> weight(ones), rstd(Values(static_cast<std::size_t>(n)));
  rms_norm(ctx, x, {}, weight.view(d), 0, out, rstd.view(n));
  double squares = 0;
  for (const double value : last) squares += value * value;
  Values wanted = last;
  for (double& value : wanted) value /= std::sqrt(squares / static_cast<double>(d));
  CHECK(relative_error(read(out[n - 1]), wanted) <= tolerance);
  CHECK(read(out[n - 2]) == ones);

  // One row of all positions: silu(x_{t-1} + 2 x_t).
  Values taps;
  for (Index c = 0; c < d; ++c) taps.insert(taps.end(), {1, 2});
  const Array<cuda, float> taps_(taps), none(Values(static_cast<std::size_t>(d)));
  causal_conv1d(ctx, x, taps_.view(d, 2), none.view(d), Rows(ctx, 1, n, {0}), {}, out);
  for (Index c = 0; c < d; ++c) {
    const double sum = 1 + 2 * last[static_cast<std::size_t>(c)];
    wanted[static_cast<std::size_t>(c)] = sum / (1 + std::exp(-sum));
  }
  CHECK(relative_error(read(out[n - 1]), wanted) <= tolerance);
}

TEST_CASE("offsets beyond 2^31: the states of selective_scan and ssd") {
  const Index N = 64, D = 8192, heads = 128, rows = limit / (N * D) + 2;
  if (!fits<float>(rows * N * D)) return;
  Context<cuda> ctx;
  const Large<float> state_(rows * N * D);
  const auto state = state_.view(rows, N, D);
  const auto u = ctx.arena().tensor<bf16>(rows, D), y = ctx.arena().tensor<bf16>(rows, D);
  const auto zero = ctx.arena().tensor<bf16>(rows, D);
  const auto B = ctx.arena().tensor<bf16>(rows, 1, N);
  const auto none = ctx.arena().tensor<float>(D, N);
  ctx.fill(u, bf16(1));
  ctx.fill(B, bf16(0.5f));
  ctx.zero(zero);
  ctx.zero(none);
  // dt = softplus(0) = ln 2, and the rate is 1, so that a step halves the state: from 3 to 1.5 + ln 2 / 2.
  const double next = 1.5 + 0.5 * std::log(2.0);
  const Rows sequences(ctx, rows, 1, std::vector<Index>(static_cast<std::size_t>(rows), 7));
  const auto check = [&](double gate) {
    const auto all = [&](double value) { return Values(static_cast<std::size_t>(D), value); };
    CHECK(relative_error(read(state[rows - 1][N - 1]), all(next)) <= 1e-6);  // float
    CHECK(relative_error(read(y[rows - 1]), all(gate * 0.5 * next * static_cast<double>(N))) <= tolerance);
  };

  ctx.fill(state, 3.0f);
  ssd(ctx,
      {u, zero.columns(0, heads), B, B, none.flat().slice(0, heads), none.flat().slice(0, heads),
       none.flat().slice(0, heads)},
      sequences, state, y);
  check(1);

  ctx.fill(state, 3.0f);
  selective_scan(ctx, {u, zero, u, B, B, none, none.flat().slice(0, D), none.flat().slice(0, D)}, sequences, state, y);
  check(1 / (1 + std::exp(-1.0)));  // silu(1)
}
