// SPDX-License-Identifier: MIT
#include <zamba/ops/attention.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#define ZAMBA_TEST_CACHES_ON On<cuda, float, bf16>
#include "attention.cpp"

namespace {

/// Rounded to bf16, as the device sees them.
Values rounded(Values values) {
  for (double& value : values) value = static_cast<double>(bf16(static_cast<float>(value)));
  return values;
}

Problem bf16_problem(AttentionShape shape, std::vector<Index> lengths, std::vector<Index> starts, Index max_length) {
  Problem p = random_problem(shape, std::move(lengths), std::move(starts), max_length);
  for (Values* values : {&p.q, &p.k, &p.v, &p.d_out, &p.cache_k, &p.cache_v}) *values = rounded(*values);
  return p;
}

/// Row `row` of a problem, on its own.
Problem row_of_problem(const Problem& batch, std::size_t row) {
  const Index first = std::accumulate(batch.lengths.begin(), batch.lengths.begin() + static_cast<long>(row), Index{0});
  const Index length = batch.lengths[row], cached = batch.max_length * batch.k_width();
  Problem alone;  // no copy of the batch, which may have many rows
  alone.shape = batch.shape;
  alone.lengths = {length};
  alone.starts = {batch.starts[row]};
  alone.max_length = batch.max_length;
  alone.padding = batch.padding;
  alone.threads = batch.threads;
  alone.q = part(batch.q, first * batch.q_width(), length * batch.q_width());
  alone.k = part(batch.k, first * batch.k_width(), length * batch.k_width());
  alone.v = part(batch.v, first * batch.k_width(), length * batch.k_width());
  alone.d_out = part(batch.d_out, first * batch.q_width(), length * batch.q_width());
  alone.cache_k = part(batch.cache_k, static_cast<Index>(row) * cached, cached);
  alone.cache_v = part(batch.cache_v, static_cast<Index>(row) * cached, cached);
  alone.d_cache_k = part(batch.d_cache_k, static_cast<Index>(row) * cached, cached);
  alone.d_cache_v = part(batch.d_cache_v, static_cast<Index>(row) * cached, cached);
  return alone;
}

/// out by the definition, of every row.
Values plain_batch(const Problem& p) {
  Values out;
  for (std::size_t row = 0; row < p.lengths.size(); ++row) {
    const Problem alone = row_of_problem(p, row);
    const Index past = p.max_length > 0 ? p.starts[row] : 0;
    const Values k = joined(part(alone.cache_k, 0, past * p.k_width()), alone.k);
    const Values v = joined(part(alone.cache_v, 0, past * p.k_width()), alone.v);
    out = joined(out, plain_attention(p.shape, alone.q, k, v, past));
  }
  return out;
}

/// Of an output in bf16, by norm: it and, on tensor cores, the probabilities are off by up to 2^-8 of themselves, each
/// 1.6e-3 by norm where mantissas are spread evenly.
constexpr double bf16_tolerance = 2.5e-3;

/// Of gradients in bf16, by norm. They, and P or dS, are rounded, 1.6e-3 each, twice as much where few pairs dominate;
/// so is `out` in d_out . out, whose error all keys of a query share, so that it may add up where those of the others
/// do not.
constexpr double bf16_gradient_tolerance = 5e-3;

using Bf16 = On<cuda, bf16>;

void check_gradients(const Result& got, const Result& wanted) {
  CHECK(relative_error(got.d_q, wanted.d_q) < bf16_gradient_tolerance);
  CHECK(relative_error(got.d_k, wanted.d_k) < bf16_gradient_tolerance);
  CHECK(relative_error(got.d_v, wanted.d_v) < bf16_gradient_tolerance);
  if (wanted.d_cache_k.empty()) return;
  CHECK(relative_error(got.d_cache_k, wanted.d_cache_k) < bf16_gradient_tolerance);
  CHECK(relative_error(got.d_cache_v, wanted.d_cache_v) < bf16_gradient_tolerance);
}

/// Against the definition, the CPU's gradients, and each row alone: what lies in unused memory is NaN.
void check_bf16(Problem p) {
  const Values wanted = plain_batch(p);
  for (std::size_t row = 0; row < p.lengths.size(); ++row)
    for (Index at = (static_cast<Index>(row) * p.max_length + p.starts[row]) * p.k_width();
         at < (static_cast<Index>(row) + 1) * p.max_length * p.k_width(); ++at)
      p.cache_k[static_cast<std::size_t>(at)] = p.cache_v[static_cast<std::size_t>(at)] = nan;
  p.padding = 8;
  const Result together = run<Bf16>(p);
  CHECK(relative_error(together.out, wanted) < bf16_tolerance);
  Result each;
  for (std::size_t row = 0; row < p.lengths.size(); ++row) {
    if (p.lengths[row] == 0) continue;
    const Result alone = run<Bf16>(row_of_problem(p, row));
    each.out = joined(each.out, alone.out);
    each.lse = joined(each.lse, alone.lse);
    each.d_q = joined(each.d_q, alone.d_q);
    each.d_k = joined(each.d_k, alone.d_k);
    each.d_v = joined(each.d_v, alone.d_v);
  }
  CHECK(each.out == together.out);
  CHECK(each.lse == together.lse);
  CHECK(each.d_q == together.d_q);
  CHECK(each.d_k == together.d_k);
  CHECK(each.d_v == together.d_v);
  // Scores of exact products, summed in float: lse is right to some 1e-7 of the scores.
  Problem exact = p;
  exact.padding = 0;
  for (Values* values : {&exact.cache_k, &exact.cache_v})
    for (double& value : *values) value = std::isnan(value) ? 0 : value;
  const Result reference = run<On<cpu, double>>(exact);
  CHECK(relative_error(together.lse, reference.lse) < 1e-5);
  check_gradients(together, reference);
}

TEST_CASE("attention in bf16: heads of every width") {
  for (const Index head_dim : {8, 40, 64, 72, 80, 88, 128, 136, 160, 168, 224, 232, 256, 264, 464, 480, 488, 512}) {
    CAPTURE(head_dim);
    check_bf16(bf16_problem(shape_of(2, 1, head_dim), {9, 1, 70}, {0, 0, 0}, 0));
    check_bf16(bf16_problem(shape_of(1, 1, head_dim), {33}, {101}, 134));
  }
}

TEST_CASE("attention in bf16: the edges of tiles") {
  for (const Index head_dim : {64, 160, 224, 464}) {
    CAPTURE(head_dim);
    for (const Index length : {5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200}) {
      CAPTURE(length);
      check_bf16(bf16_problem(shape_of(1, 1, head_dim), {length}, {0}, 0));
    }
    check_bf16(bf16_problem(shape_of(1, 1, head_dim), {6, 0, 63, 4, 66, 0}, {250, 3, 65, 190, 0, 0}, 256));
  }
}

TEST_CASE("attention in bf16: rows of many tiles of keys") {
  for (const Index head_dim : {64, 80, 128, 160, 224, 256, 464, 512}) {
    CAPTURE(head_dim);
    check_bf16(bf16_problem(shape_of(4, 2, head_dim), {333, 6, 130}, {0, 0, 0}, 0));
    check_bf16(bf16_problem(shape_of(1, 1, head_dim), {70, 257}, {600, 190}, 680));
  }
}

TEST_CASE("attention in bf16: groups of heads") {
  for (const Index group : {1, 2, 3, 4, 6}) {
    CAPTURE(group);
    check_bf16(bf16_problem(shape_of(2 * group, 2, 24), {1, 40, 3}, {300, 20, 65}, 320));
  }
}

TEST_CASE("attention in bf16: one token over a long cache") {
  for (const Index past : {0, 62, 63, 64, 2046, 2047, 2048, 2200}) {
    CAPTURE(past);
    check_bf16(bf16_problem(shape_of(2, 2, 16), {1, 1}, {past, 5}, 2300));
  }
  check_bf16(bf16_problem(shape_of(1, 1, 464), {1, 2}, {140, 60}, 150));
}

TEST_CASE("attention in bf16: one token of so many rows that blocks take splits in turn") {
  constexpr Index rows = 300, positions = 260;
  std::vector<Index> starts;
  for (Index row = 0; row < rows; ++row) starts.push_back(row * 37 % positions);
  const Problem p = bf16_problem(shape_of(4, 4, 8), std::vector<Index>(rows, 1), starts, positions);
  const Result together = run<Bf16>(p);
  CHECK(relative_error(together.out, plain_batch(p)) < bf16_tolerance);
  for (const std::size_t row : {0, 7, 150, 299}) {
    const Result alone = run<Bf16>(row_of_problem(p, row));
    const auto first = static_cast<Index>(row) * p.q_width();
    CHECK(alone.out == part(together.out, first, p.q_width()));
    CHECK(alone.cache_k ==
          part(together.cache_k, static_cast<Index>(row) * positions * p.k_width(), positions * p.k_width()));
  }
}

TEST_CASE("attention in bf16: cuts of a sequence agree, and reruns are bit-equal") {
  for (const Index head_dim : {32, 232}) {
    CAPTURE(head_dim);
    Problem p = bf16_problem(shape_of(2, 1, head_dim), {150}, {10}, 160);
    const Result whole = run<Bf16>(p);
    CHECK(run<Bf16>(p) == whole);
    for (const Index first : {1, 4, 5, 70, 149}) {
      const Result cut = chunked<Bf16>(p, {first, 150 - first});
      CHECK(relative_error(cut.out, whole.out) < bf16_tolerance);
      CHECK(relative_error(cut.lse, whole.lse) < 1e-6);
      CHECK(cut.cache_k == whole.cache_k);
      CHECK(cut.cache_v == whole.cache_v);
      check_gradients(cut, whole);
    }
  }
}

TEST_CASE("attention in bf16: gradients of long rows, and of many that are short") {
  for (const Index length : {1000, 4099}) {
    CAPTURE(length);
    const Problem p = bf16_problem(shape_of(1, 1, 16), {length}, {0}, 0);
    check_gradients(run<Bf16>(p), run<On<cpu, double>>(p));
  }
  std::vector<Index> lengths(200, 1);
  for (std::size_t row = 0; row < lengths.size(); row += 7) lengths[row] = static_cast<Index>(row % 40);
  for (const Index head_dim : {64, 160, 464}) {
    CAPTURE(head_dim);
    const Problem p = bf16_problem(shape_of(2, 1, head_dim), lengths, std::vector<Index>(lengths.size(), 0), 0);
    check_gradients(run<Bf16>(p), run<On<cpu, double>>(p));
  }
}

TEST_CASE("attention in bf16: gradients without those of caches") {
  Problem p = bf16_problem(shape_of(2, 1, 128), {150, 0, 20}, {200, 7, 0}, 380);
  std::fill(p.d_cache_k.begin(), p.d_cache_k.end(), 0.0);
  p.d_cache_v = p.d_cache_k;
  const Result with = run<Bf16>(p);
  p.d_cache_k = p.d_cache_v = {};
  const Result without = run<Bf16>(p);
  CHECK(without.d_q == with.d_q);
  CHECK(without.d_k == with.d_k);
  CHECK(without.d_v == with.d_v);
}

TEST_CASE("attention in bf16: scores of any size give finite numbers") {
  Problem p = bf16_problem(shape_of(1, 1, 64), {140}, {0}, 0);
  p.shape.scale = 1e4;
  const Result result = run<Bf16>(p);
  for (const Values* values : {&result.out, &result.d_q, &result.d_k, &result.d_v})
    for (const double value : *values) CHECK(std::isfinite(value));
}

TEST_CASE("attention in bf16: memory that is not aligned to 16 bytes") {
  Problem p = bf16_problem(shape_of(2, 1, 40), {60, 1}, {7, 90}, 100);
  const Values wanted = plain_batch(p);
  p.padding = 3;
  const Result result = run<Bf16>(p);
  CHECK(relative_error(result.out, wanted) < bf16_tolerance);
  check_gradients(result, run<On<cpu, double>>(p));
}

}  // namespace
