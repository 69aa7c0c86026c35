// SPDX-License-Identifier: MIT
#include <zamba/ops/attention.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/random.hpp>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"
#include "../support/fixture.hpp"

namespace {

using namespace zamba;
using zamba::testing::finite_differences, zamba::testing::PaddedMatrix, zamba::testing::relative_error,
    zamba::testing::Values;

/// Where and in which types to run: activations of T, caches of S.
template <class Device_, class T_, class S_ = T_>
struct On {
  using Device = Device_;
  using T = T_;
  using S = S_;
  static constexpr bool on_cpu = std::is_same_v<Device, cpu>, backward = defines_backward<Attention<Device>>;
};

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// Caches of another type than the activations.
#ifndef ZAMBA_TEST_CACHES_ON
#define ZAMBA_TEST_CACHES_ON On<cpu, float, bf16>, On<cpu, double, float>
#endif

/// Of one norm: the fixtures are rounded to float; in float, products of some hundred terms and the exponential's 2e-7.
template <class T>
constexpr double tolerance = sizeof(T) == 8 ? 2e-7 : 2e-6;

/// Between two orders of summation of the same products.
template <class T>
constexpr double rounding = sizeof(T) == 8 ? 1e-14 : 2e-6;

Values random_values(Index count, std::uint64_t stream) {
  Random random(Seed{13}, stream);
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) value = random.normal();
  return values;
}

Values part(const Values& values, Index first, Index count) {
  if (values.empty()) return {};
  return {values.begin() + first, values.begin() + first + count};
}

Values joined(Values a, const Values& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Problem {
  AttentionShape shape;
  Values q, k, v, d_out;
  std::vector<Index> lengths, starts;
  Index max_length = 0;                           // 0: no caches
  Values cache_k, cache_v, d_cache_k, d_cache_v;  // (rows, max_length, kv_heads * head_dim)
  Index padding = 0;                              // NaNs between the rows of a matrix and the positions of a cache
  int threads = 1;

  Index q_width() const { return shape.heads * shape.head_dim; }
  Index k_width() const { return shape.kv_heads * shape.head_dim; }
};

struct Result {
  Values out, lse, cache_k, cache_v, d_q, d_k, d_v, d_cache_k, d_cache_v;
  bool operator==(const Result&) const = default;
};

/// Forward and, where the device has it, backward.
template <class Where>
Result run(const Problem& p) {
  using Device = typename Where::Device;
  using T = typename Where::T;
  using S = typename Where::S;
  using F = compute_t<T>;
  const Index rows = static_cast<Index>(p.lengths.size());
  auto ctx = zamba::testing::new_context<Device>(p.threads);
  std::vector<Index> offsets(1, 0);
  for (const Index length : p.lengths) offsets.push_back(offsets.back() + length);
  const Sequences sequences{ctx.readable(offsets.data(), rows + 1),
                            p.starts.empty() ? nullptr : ctx.readable(p.starts.data(), rows), rows, offsets.back(),
                            *std::max_element(p.lengths.begin(), p.lengths.end())};
  const auto activations = [&](const Values& values, Index width) {
    return PaddedMatrix<Device, T>::of_width(values, width, p.padding);
  };
  const auto cache = [&](const Values& values) {
    return PaddedMatrix<Device, S>::of_width(values, p.k_width(), p.padding);
  };
  const Values new_q(p.q.size(), nan), new_k(p.k.size(), nan);
  const auto q = activations(p.q, p.q_width()), k = activations(p.k, p.k_width()), v = activations(p.v, p.k_width());
  const auto out = activations(new_q, p.q_width());
  const auto lse = PaddedMatrix<Device, F>::of_width(
      Values(static_cast<std::size_t>(offsets.back() * p.shape.heads), nan), p.shape.heads, p.padding);
  const auto cache_k = cache(p.cache_k), cache_v = cache(p.cache_v);
  attention(ctx, p.shape, q.view(), k.view(), v.view(), sequences, cache_k.parts(rows), cache_v.parts(rows), out.view(),
            lse.view());
  Result result;
  if constexpr (Where::backward) {
    const auto d_out = activations(p.d_out, p.q_width()), d_q = activations(new_q, p.q_width());
    const auto d_k = activations(new_k, p.k_width()), d_v = activations(new_k, p.k_width());
    const auto of_cache = [&](const Values& values) {
      return PaddedMatrix<Device, F>::of_width(values, p.k_width(), p.padding);
    };
    const auto d_cache_k = of_cache(p.d_cache_k), d_cache_v = of_cache(p.d_cache_v);
    attention_backward(ctx, p.shape, d_out.view(), q.view(), k.view(), v.view(), sequences,
                       Tensor<const S, 3>(cache_k.parts(rows)), cache_v.parts(rows), out.view(), lse.view(), d_q.view(),
                       d_k.view(), d_v.view(), d_cache_k.parts(rows), d_cache_v.parts(rows));
    result.d_q = d_q.values();
    result.d_k = d_k.values();
    result.d_v = d_v.values();
    result.d_cache_k = d_cache_k.values();
    result.d_cache_v = d_cache_v.values();
  }
  result.out = out.values();
  result.lse = lse.values();
  result.cache_k = cache_k.values();
  result.cache_v = cache_v.values();
  return result;
}

/// Everything random; unused positions of the caches too.
Problem random_problem(AttentionShape shape, std::vector<Index> lengths, std::vector<Index> starts, Index max_length) {
  Problem p;
  p.shape = shape;
  const Index tokens = std::accumulate(lengths.begin(), lengths.end(), Index{0});
  const Index cached = static_cast<Index>(lengths.size()) * max_length * p.k_width();
  p.q = random_values(tokens * p.q_width(), 1);
  p.k = random_values(tokens * p.k_width(), 2);
  p.v = random_values(tokens * p.k_width(), 3);
  p.d_out = random_values(tokens * p.q_width(), 4);
  p.lengths = std::move(lengths);
  p.starts = std::move(starts);
  p.max_length = max_length;
  p.cache_k = random_values(cached, 5);
  p.cache_v = random_values(cached, 6);
  p.d_cache_k = random_values(cached, 7);
  p.d_cache_v = random_values(cached, 8);
  return p;
}

AttentionShape shape_of(Index heads, Index kv_heads, Index head_dim) {
  return {heads, kv_heads, head_dim, 1 / std::sqrt(static_cast<double>(head_dim))};
}

/// out by the definition, for one row that attends to keys and values (positions, kv_heads * head_dim).
Values plain_attention(const AttentionShape& shape, const Values& q, const Values& k, const Values& v, Index past) {
  const Index d = shape.head_dim, q_width = shape.heads * d, k_width = shape.kv_heads * d;
  const Index length = static_cast<Index>(q.size()) / q_width;
  Values out(q.size());
  for (Index t = 0; t < length; ++t)
    for (Index head = 0; head < shape.heads; ++head) {
      const double* query = q.data() + t * q_width + head * d;
      const Index column = head / (shape.heads / shape.kv_heads) * d;
      Values weights;
      for (Index j = 0; j <= past + t; ++j)
        weights.push_back(
            std::exp(shape.scale * std::inner_product(query, query + d, k.data() + j * k_width + column, 0.0)));
      const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (Index j = 0; j <= past + t; ++j)
        for (Index c = 0; c < d; ++c)
          out[static_cast<std::size_t>(t * q_width + head * d + c)] +=
              weights[static_cast<std::size_t>(j)] / total * v[static_cast<std::size_t>(j * k_width + column + c)];
    }
  return out;
}

TEST_CASE_TEMPLATE("attention agrees with the reference", Where, ZAMBA_TEST_ON) {
  const auto& fixture = zamba::testing::Fixture::operators();
  const auto in = [&](const char* name) { return fixture.values(std::string("attention_gqa.") + name); };
  Problem p = random_problem({4, 2, 10, 1 / std::sqrt(5.0)}, {19, 19}, {}, 0);
  p.q = in("in.q");
  p.k = in("in.k");
  p.v = in("in.v");
  p.d_out = in("cotangent.y");
  for (const Index max_length : {0, 19, 32}) {  // its own tokens, or through a cache
    CAPTURE(max_length);
    p.cache_k.assign(static_cast<std::size_t>(2 * max_length * p.k_width()), nan);
    p.cache_v = p.cache_k;
    p.d_cache_k.assign(p.cache_k.size(), 0.0);
    p.d_cache_v = p.d_cache_k;
    const Result result = run<Where>(p);
    CHECK(relative_error(result.out, in("out.y")) < tolerance<typename Where::T>);
    if (!Where::backward) continue;
    CHECK(relative_error(result.d_q, in("grad.q")) < tolerance<typename Where::T>);
    CHECK(relative_error(result.d_k, in("grad.k")) < tolerance<typename Where::T>);
    CHECK(relative_error(result.d_v, in("grad.v")) < tolerance<typename Where::T>);
  }
}

TEST_CASE_TEMPLATE("attention agrees with its definition over several blocks of keys", Where, ZAMBA_TEST_ON) {
  struct Size {
    Index heads, kv_heads, head_dim, length, past;
  };
  for (const Size& size : {Size{2, 2, 16, 150, 600}, Size{6, 2, 10, 70, 1030}, Size{3, 1, 128, 1, 1500},
                           Size{1, 1, 464, 1, 515}, Size{80, 1, 8, 3, 2}, Size{1, 1, 1, 5, 0}}) {
    CAPTURE(size.head_dim);
    const Index past = size.past, end = past + size.length;
    const Problem p = random_problem(shape_of(size.heads, size.kv_heads, size.head_dim), {size.length}, {past}, end);
    const Result result = run<Where>(p);
    const Values k = joined(part(p.cache_k, 0, past * p.k_width()), p.k);
    const Values v = joined(part(p.cache_v, 0, past * p.k_width()), p.v);
    CHECK(relative_error(result.out, plain_attention(p.shape, p.q, k, v, past)) < tolerance<typename Where::T>);
  }
}

double dot(const Values& a, const Values& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

TEST_CASE("attention: finite differences") {
  // Central differences: step^2 = 1e-10 of curvature, 1e-16 / step = 1e-11 of rounding.
  SUBCASE("over the row's own tokens") {
    Problem p = random_problem(shape_of(4, 2, 3), {5, 0, 1, 3}, {}, 0);
    const auto loss = [&] { return dot(run<On<cpu, double>>(p).out, p.d_out); };
    const Result result = run<On<cpu, double>>(p);
    CHECK(relative_error(result.d_q, finite_differences(p.q, 1e-5, loss)) < 1e-8);
    CHECK(relative_error(result.d_k, finite_differences(p.k, 1e-5, loss)) < 1e-8);
    CHECK(relative_error(result.d_v, finite_differences(p.v, 1e-5, loss)) < 1e-8);
  }
  SUBCASE("through the caches") {
    Problem p = random_problem(shape_of(4, 2, 3), {3, 0, 1, 2}, {2, 3, 4, 0}, 6);
    const auto loss = [&] {
      const Result result = run<On<cpu, double>>(p);
      return dot(result.out, p.d_out) + dot(result.cache_k, p.d_cache_k) + dot(result.cache_v, p.d_cache_v);
    };
    const Result result = run<On<cpu, double>>(p);
    CHECK(relative_error(result.d_q, finite_differences(p.q, 1e-5, loss)) < 1e-8);
    CHECK(relative_error(result.d_k, finite_differences(p.k, 1e-5, loss)) < 1e-8);
    CHECK(relative_error(result.d_v, finite_differences(p.v, 1e-5, loss)) < 1e-8);
    CHECK(relative_error(result.d_cache_k, finite_differences(p.cache_k, 1e-5, loss)) < 1e-8);
    CHECK(relative_error(result.d_cache_v, finite_differences(p.cache_v, 1e-5, loss)) < 1e-8);
  }
}

/// What the chunks of a row give one after the other, caches and their gradients handed on.
template <class Where>
Result chunked(const Problem& whole, const std::vector<Index>& lengths) {
  Result all;
  std::vector<Problem> chunks;
  Index first = 0;
  for (const Index length : lengths) {
    Problem chunk = whole;
    chunk.q = part(whole.q, first * whole.q_width(), length * whole.q_width());
    chunk.d_out = part(whole.d_out, first * whole.q_width(), length * whole.q_width());
    chunk.k = part(whole.k, first * whole.k_width(), length * whole.k_width());
    chunk.v = part(whole.v, first * whole.k_width(), length * whole.k_width());
    chunk.lengths = {length};
    chunk.starts = {whole.starts[0] + first};
    if (!chunks.empty()) {
      chunk.cache_k = all.cache_k;
      chunk.cache_v = all.cache_v;
    }
    chunks.push_back(chunk);
    const Result result = run<Where>(chunk);
    all.out = joined(all.out, result.out);
    all.lse = joined(all.lse, result.lse);
    all.cache_k = result.cache_k;
    all.cache_v = result.cache_v;
    first += length;
  }
  all.d_cache_k = whole.d_cache_k;
  all.d_cache_v = whole.d_cache_v;
  for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
    chunk->d_cache_k = all.d_cache_k;
    chunk->d_cache_v = all.d_cache_v;
    const Result result = run<Where>(*chunk);
    all.d_q = joined(result.d_q, all.d_q);
    all.d_k = joined(result.d_k, all.d_k);
    all.d_v = joined(result.d_v, all.d_v);
    all.d_cache_k = result.d_cache_k;
    all.d_cache_v = result.d_cache_v;
  }
  return all;
}

/// Equal to rounding; what is stored is equal.
void check_close(const Result& a, const Result& b, double bound) {
  CHECK(relative_error(a.out, b.out) < bound);
  CHECK(relative_error(a.lse, b.lse) < bound);
  CHECK(a.cache_k == b.cache_k);
  CHECK(a.cache_v == b.cache_v);
  CHECK(relative_error(a.d_q, b.d_q) < bound);
  CHECK(relative_error(a.d_k, b.d_k) < bound);
  CHECK(relative_error(a.d_v, b.d_v) < bound);
  CHECK(relative_error(a.d_cache_k, b.d_cache_k) < bound);
  CHECK(relative_error(a.d_cache_v, b.d_cache_v) < bound);
}

TEST_CASE_TEMPLATE("attention: every split of a sequence gives the same", Where, ZAMBA_TEST_ON, ZAMBA_TEST_CACHES_ON) {
  const Index length = 13;
  for (const Index start : {0, 4}) {
    const Problem p = random_problem(shape_of(4, 2, 10), {length}, {start}, start + length);
    const Result whole = run<Where>(p);
    for (Index first = 1; first < length; ++first)
      for (Index second = 0; first + second < length; ++second) {
        CAPTURE(first);
        CAPTURE(second);
        check_close(chunked<Where>(p, {first, second, length - first - second}), whole, rounding<typename Where::T>);
      }
  }
}

TEST_CASE("attention: gradients do not depend on the blocks") {
  // One long row against chunks of one token each, whose queries are not stacked and whose own keys are never masked.
  const Problem p = random_problem(shape_of(2, 1, 4), {140}, {530}, 670);
  check_close(chunked<On<cpu, double>>(p, std::vector<Index>(140, 1)), run<On<cpu, double>>(p), 1e-13);
}

TEST_CASE_TEMPLATE("attention: a ragged batch equals each row alone", Where, ZAMBA_TEST_ON) {
  for (const Index max_length : {0, 150}) {
    const Problem batch = random_problem(shape_of(4, 2, 10), {0, 5, 70, 0, 1, 130}, {3, 0, 6, 0, 8, 1}, max_length);
    const Result together = run<Where>(batch);
    const Index q_width = batch.q_width(), k_width = batch.k_width(), cached = max_length * k_width;
    Index first = 0;
    for (std::size_t row = 0; row < batch.lengths.size(); ++row) {
      const Index length = batch.lengths[row], at = static_cast<Index>(row) * cached;
      Problem alone = batch;
      alone.lengths = {length};
      alone.starts = {batch.starts[row]};
      alone.q = part(batch.q, first * q_width, length * q_width);
      alone.d_out = part(batch.d_out, first * q_width, length * q_width);
      alone.k = part(batch.k, first * k_width, length * k_width);
      alone.v = part(batch.v, first * k_width, length * k_width);
      alone.cache_k = part(batch.cache_k, at, cached);
      alone.cache_v = part(batch.cache_v, at, cached);
      alone.d_cache_k = part(batch.d_cache_k, at, cached);
      alone.d_cache_v = part(batch.d_cache_v, at, cached);
      const Result result = run<Where>(alone);
      CHECK(result.out == part(together.out, first * q_width, length * q_width));
      CHECK(result.d_q == part(together.d_q, first * q_width, length * q_width));
      CHECK(result.d_k == part(together.d_k, first * k_width, length * k_width));
      CHECK(result.d_v == part(together.d_v, first * k_width, length * k_width));
      CHECK(result.cache_k == part(together.cache_k, at, cached));
      CHECK(result.cache_v == part(together.cache_v, at, cached));
      CHECK(result.d_cache_k == part(together.d_cache_k, at, cached));
      CHECK(result.d_cache_v == part(together.d_cache_v, at, cached));
      first += length;
    }
  }
}

TEST_CASE_TEMPLATE("attention never reads unused positions of a cache", Where, ZAMBA_TEST_ON) {
  // Rows that end within a tile, at decode, without a past and without tokens.
  Problem p = random_problem(shape_of(4, 2, 10), {7, 1, 3, 0, 66}, {5, 9, 0, 4, 3}, 80);
  const Result clean = run<Where>(p);
  const auto unused = [&](std::size_t row, Index position) {
    return p.lengths[row] > 0 ? position >= p.starts[row] : true;
  };
  for (std::size_t row = 0; row < p.lengths.size(); ++row)
    for (Index position = 0; position < p.max_length; ++position)
      if (unused(row, position))
        for (Index c = 0; c < p.k_width(); ++c) {
          const auto at =
              static_cast<std::size_t>((static_cast<Index>(row) * p.max_length + position) * p.k_width() + c);
          p.cache_k[at] = p.cache_v[at] = nan;
          const bool own = p.lengths[row] > 0 && position < p.starts[row] + p.lengths[row];
          if (!own) p.d_cache_k[at] = p.d_cache_v[at] = nan;
        }
  const Result poisoned = run<Where>(p);
  CHECK(poisoned.out == clean.out);
  CHECK(poisoned.lse == clean.lse);
  CHECK(poisoned.d_q == clean.d_q);
  CHECK(poisoned.d_k == clean.d_k);
  CHECK(poisoned.d_v == clean.d_v);
  CHECK(std::isnan(poisoned.cache_k.back()));
}

TEST_CASE_TEMPLATE("attention: an output depends on no later token", Where, ZAMBA_TEST_ON) {
  const Index length = 75;
  for (const Index max_length : {0, 100}) {
    const Problem p = random_problem(shape_of(4, 2, 10), {length}, {9}, max_length);
    const Result before = run<Where>(p);
    for (const Index at : {0, 1, 31, 32, 40, 74}) {
      Problem changed = p;
      for (Index c = 0; c < p.k_width(); ++c) {
        changed.k[static_cast<std::size_t>(at * p.k_width() + c)] += 1;
        changed.v[static_cast<std::size_t>(at * p.k_width() + c)] += 1;
      }
      const Result after = run<Where>(changed);
      CHECK(part(after.out, 0, at * p.q_width()) == part(before.out, 0, at * p.q_width()));
      CHECK(part(after.out, at * p.q_width(), p.q_width()) != part(before.out, at * p.q_width(), p.q_width()));
    }
  }
}

TEST_CASE_TEMPLATE("attention: strides, threads and reruns change no bit", Where, ZAMBA_TEST_ON, ZAMBA_TEST_CACHES_ON) {
  for (const Index max_length : {0, 640}) {
    Problem p = random_problem(shape_of(4, 2, 20), {100, 0, 1, 30}, {530, 2, 610, 0}, max_length);
    const Result once = run<Where>(p);
    CHECK(run<Where>(p) == once);
    p.threads = 2;
    CHECK(run<Where>(p) == once);
    p.padding = 8;  // rows still begin at multiples of 16 bytes
    CHECK(run<Where>(p) == once);
    p.padding = 5;
    if (Where::on_cpu)
      CHECK(run<Where>(p) == once);
    else  // loads of single elements, by another kernel
      check_close(run<Where>(p), once, rounding<typename Where::T>);
  }
}

TEST_CASE("attention: scores of any size give finite numbers") {
  Problem p = random_problem(shape_of(1, 1, 4), {20}, {0}, 0);
  p.shape.scale = 1e4;
  for (const double value : run<On<cpu, float>>(p).out) CHECK(std::isfinite(value));
  for (const double value : run<On<cpu, float>>(p).d_q) CHECK(std::isfinite(value));
}

TEST_CASE("attention refuses a row that its cache cannot hold, and heads that do not divide") {
  using InFloat = On<cpu, float>;
  CHECK_THROWS_WITH_AS(run<InFloat>(random_problem(shape_of(2, 1, 4), {1, 3}, {0, 5}, 7)),
                       "zamba: attention: row 1 needs 8 positions, its cache has 7", Error);
  CHECK_THROWS_WITH_AS(run<InFloat>(random_problem(shape_of(3, 2, 4), {1}, {}, 0)),
                       "zamba: attention: heads must be a multiple of kv_heads, got 3 and 2", Error);
}

}  // namespace
