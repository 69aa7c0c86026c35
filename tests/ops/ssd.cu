// SPDX-License-Identifier: MIT
#include <zamba/ops/ssd.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "ssd.cpp"

namespace {

/// What a bf16 array holds exactly.
Problem stored(Problem p) {
  for (Values* values : {&p.u, &p.delta, &p.B, &p.C})
    for (double& value : *values) value = bf16(static_cast<float>(value));
  return p;
}

Values part_of(const Values& values, Index begin, Index count) {
  return Values(values.begin() + begin, values.begin() + begin + count);
}

/// A row of a problem as a problem of its own.
Problem row_of(const Problem& p, Index row) {
  Problem alone = p;
  alone.rows = 1;
  alone.lengths = {p.lengths[row]};
  alone.starts = {p.starts[row]};
  Index begin = 0;
  for (Index before = 0; before < row; ++before) begin += p.lengths[before];
  for (Values* values : {&alone.u, &alone.delta, &alone.B, &alone.C}) {
    const Index width = static_cast<Index>(values->size()) / p.tokens();
    *values = part_of(*values, begin * width, p.lengths[row] * width);
  }
  const Index size = p.channels() * p.states;
  alone.h0 = part_of(p.h0, row * size, size);
  return alone;
}

/// y and the state in bf16 against those in float, by norm and row by row. Every factor is rounded to 8 bits, by 2^-8
/// of it at most and some 2^-9.3 on average (root of the mean square): once in a state, two or three times in y, with
/// random signs.
void check_in_bf16(const Problem& p, Index chunk = ssd_chunk) {
  const Result exact = run<cuda, float>(p, true, {}, {}, 1, chunk), got = run<cuda, bf16>(p, true, {}, {}, 1, chunk);
  const Index D = p.channels(), size = D * p.states;
  for (Index row = 0, begin = 0; row < p.rows; begin += p.lengths[row++]) {
    if (p.lengths[row] == 0) continue;
    CAPTURE(row);
    CAPTURE(p.lengths[row]);
    CHECK(relative_error(part_of(got.y, begin * D, p.lengths[row] * D),
                         part_of(exact.y, begin * D, p.lengths[row] * D)) < 0x1p-8);
    CHECK(relative_error(part_of(got.h, row * size, size), part_of(exact.h, row * size, size)) < 0x1p-8);
  }
}

TEST_CASE("ssd in bf16 is that in float, at the edges of chunks and of few tokens") {
  for (const Index length : {1, 8, 9, 15, 16, 17, 63, 64, 65, 128, 129, 200})
    check_in_bf16(stored(random_problem({length}, {0}, 1, 2, 16, 16)));
  check_in_bf16(stored(random_problem({200}, {7}, 1, 2, 16, 16)));
}

TEST_CASE("ssd in bf16 is that in float, for all sizes of heads and states") {
  for (const Index N : {8, 16, 56, 64, 72, 128})
    for (const Index per_head : {8, 32, 40, 64, 72}) {
      CAPTURE(N);
      CAPTURE(per_head);
      check_in_bf16(stored(random_problem({70}, {3}, 1, 1, per_head, N)));
    }
  // Those that products do not fit.
  for (const auto& [per_head, N] : {std::pair<Index, Index>{12, 16}, {16, 12}, {8, 136}, {7, 5}})
    check_in_bf16(stored(random_problem({70}, {3}, 1, 2, per_head, N)));
}

TEST_CASE("ssd in bf16: groups, ragged rows, rows of no tokens, and what comes before a row") {
  Problem p = stored(random_problem({9, 0, 130, 64, 3, 65}, {0, 2, 5, 0, 1, 1}, 2, 4, 24, 24));
  const Index D = p.channels(), size = D * p.states;
  for (const Index row : {0, 3})  // must not read the state
    std::fill_n(p.h0.begin() + row * size, size, std::nan(""));
  check_in_bf16(p);
  const Result all = run<cuda, bf16>(p, true);
  CHECK(run<cuda, bf16>(p, true) == all);
  CHECK(part_of(all.h, size, size) == part_of(run<cuda, float>(p, true).h, size, size));  // kept
  // Each row alone gives the same bits.
  for (Index row = 0, begin = 0; row < p.rows; begin += p.lengths[row++]) {
    if (p.lengths[row] == 0) continue;
    const Result result = run<cuda, bf16>(row_of(p, row), true);
    CHECK(result.y == part_of(all.y, begin * D, p.lengths[row] * D));
    CHECK(result.h == part_of(all.h, row * size, size));
  }
}

TEST_CASE("ssd in bf16: segments of a row in parallel, and one after the other among many rows, give the same bits") {
  // Segments have 512 tokens. Alone a row has fewer blocks than multiprocessors, together they have more than enough.
  std::vector<Index> lengths{513, 1700, 512, 0, 1024, 4}, starts{0, 3, 1, 2, 0, 1};
  lengths.resize(240, 9), starts.resize(240, 1);
  Problem p = stored(random_problem(lengths, starts, 1, 2, 24, 24));
  for (double& value : p.delta) value -= 4;  // the state outlasts a segment
  p = stored(p);
  const Result all = run<cuda, bf16>(p, true);
  const Index D = p.channels(), size = D * p.states;
  for (Index row = 0, begin = 0; row < 6; begin += p.lengths[row++]) {
    if (p.lengths[row] == 0) continue;
    CAPTURE(row);
    const Problem alone = row_of(p, row);
    check_in_bf16(alone);
    const Result result = run<cuda, bf16>(alone, true);
    CHECK(run<cuda, bf16>(alone, true) == result);
    CHECK(result.y == part_of(all.y, begin * D, p.lengths[row] * D));
    CHECK(result.h == part_of(all.h, row * size, size));
    const Index chunks = ceil_div(p.lengths[row], ssd_chunk), first = begin / ssd_chunk + row;
    CHECK(part_of(result.kept, 0, chunks * size) == part_of(all.kept, first * size, chunks * size));
  }
  // Some together, in segments, one of few tokens and one without any among them.
  Problem some = p;
  some.rows = 6;
  some.lengths.resize(6), some.starts.resize(6);
  const Index tokens = some.tokens();
  for (Values* values : {&some.u, &some.delta, &some.B, &some.C})
    values->resize(values->size() / static_cast<std::size_t>(p.tokens()) * static_cast<std::size_t>(tokens));
  some.h0.resize(static_cast<std::size_t>(6 * size));
  const Result result = run<cuda, bf16>(some, true);
  CHECK(result.y == part_of(all.y, 0, tokens * D));
  CHECK(result.h == part_of(all.h, 0, 6 * size));
}

TEST_CASE("ssd in bf16: a sequence cut in two, at any place and without a state") {
  const Problem whole = stored(random_problem({140}, {0}, 1, 2, 16, 16));
  const Result expected = run<cuda, bf16>(whole, true);
  CHECK(run<cuda, bf16>(whole, false).y == expected.y);
  for (const Index first : {1, 8, 9, 40, 64, 65, 131, 139}) {
    const auto part = [&](Index begin, Index count, const Values& h) {
      Problem p = whole;
      p.lengths = {count};
      p.starts = {begin};
      p.h0 = h;
      for (Values* values : {&p.u, &p.delta, &p.B, &p.C}) {
        const Index width = static_cast<Index>(values->size()) / 140;
        *values = part_of(*values, begin * width, count * width);
      }
      return run<cuda, bf16>(p, true);
    };
    const Result left = part(0, first, nans(whole.h0.size())), right = part(first, 140 - first, left.h);
    Values y = left.y;
    y.insert(y.end(), right.y.begin(), right.y.end());
    // Both are within the bound of check_in_bf16 of the recurrence in float.
    CHECK(relative_error(y, expected.y) < 0x1p-7);
    CHECK(relative_error(right.h, expected.h) < 0x1p-7);
  }
}

TEST_CASE("ssd in bf16: decays so strong that their products vanish, weak ones after them, and the least dt") {
  Problem p = random_problem({128}, {3}, 1, 2, 16, 16);
  for (double& value : p.A_log) value += 2.5;  // A near -12
  for (Index t = 0; t < 128; ++t)
    for (Index h = 0; h < p.heads; ++h) p.delta[t * p.heads + h] += t % 64 < 40 ? 30 : -6;
  p = stored(p);
  check_in_bf16(p);
  // The weak ones by themselves: their outputs are much smaller.
  const Index D = p.channels();
  const Values exact = run<cuda, float>(p, true).y, got = run<cuda, bf16>(p, true).y;
  for (const Index t : {44, 108})
    CHECK(relative_error(part_of(got, t * D, 20 * D), part_of(exact, t * D, 20 * D)) < 0x1p-7);
  p.dt_min = 0.5;
  check_in_bf16(p);
}

TEST_CASE("ssd in bf16 keeps the states that it keeps in float") {
  // Chunks of another length take the recurrence, whose states are those in float.
  const Problem p = stored(random_problem({70, 129, 5}, {0, 2, 0}, 1, 2, 16, 16));
  for (const Index chunk : {64, 48}) check_in_bf16(p, chunk);
  const Values exact = run<cuda, float>(p, true).kept, got = run<cuda, bf16>(p, true).kept;
  const Index size = p.channels() * p.states;
  for (const Index k : {0, 1, 2, 3, 4, 5}) {  // 2 + 3 + 1 chunks; the first of a row that begins at 0 is 0
    CAPTURE(k);
    const Values a = part_of(got, k * size, size), b = part_of(exact, k * size, size);
    if (k == 0 || k == 5)
      CHECK(a == b);
    else
      CHECK(relative_error(a, b) < 0x1p-8);
  }
}

/// Cotangents of y and of the final states, as bf16 holds those of y.
struct Cotangents {
  Values y, h;
  explicit Cotangents(const Problem& p) {
    Random random(Seed{5}, 0);
    for (std::size_t i = 0; i < p.u.size(); ++i) y.push_back(bf16(static_cast<float>(random.normal())));
    for (std::size_t i = 0; i < p.h0.size(); ++i) h.push_back(random.normal());
  }
};

/// sums: gradients that are sums over channels, states and tokens.
void check_gradients(const Result& got, const Result& exact, double tolerance, double sums) {
  for (const auto member : {&Result::d_u, &Result::d_B, &Result::d_C, &Result::d_h0})
    CHECK(relative_error(got.*member, exact.*member) < tolerance);
  for (const auto member : {&Result::d_delta, &Result::d_A_log, &Result::d_D, &Result::d_dt_bias})
    CHECK(relative_error(got.*member, exact.*member) < sums);
}

/// As check_in_bf16: up to three factors of each product and the result are rounded to 8 bits, by 2^-9 of them. Sums
/// have terms of both signs, of which less may remain than of their errors.
constexpr double of_bf16 = 0x1p-7, of_bf16_sums = 0x1p-6;
void check_gradients_in_bf16(const Problem& p, Index chunk = ssd_chunk) {
  const Cotangents of(p);
  check_gradients(run<cuda, bf16>(p, true, of.y, of.h, 1, chunk), run<cuda, float>(p, true, of.y, of.h, 1, chunk),
                  of_bf16, of_bf16_sums);
}

TEST_CASE_TEMPLATE("ssd: gradients are those of the CPU in double", Where, On<cuda, float>, On<cuda, double>) {
  for (const Index N : {1, 8, 33, 130})
    for (const Index per_head : {1, 7, 32, 100})
      for (const Index chunk : {16, 64}) {
        CAPTURE(N);
        CAPTURE(per_head);
        Problem p = random_problem({5, 0, 64, 150, 1}, {0, 4, 2, 0, 7}, 2, 6, per_head, N);
        p.dt_min = 0.2;
        const Cotangents of(p);
        const Result exact = run<cpu, double>(p, true, of.y, of.h, 1, chunk);
        check_gradients(run<cuda, typename Where::type>(p, true, of.y, of.h, 1, chunk), exact, 10 * Where::definition,
                        10 * Where::definition);
      }
}

TEST_CASE("ssd in bf16: gradients are those in float, at the edges of chunks") {
  for (const Index length : {1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 200, 4099})
    for (const Index start : {0, 7}) {
      CAPTURE(length);
      Problem p = stored(random_problem({length}, {start}, 1, 3, 16, 16));
      check_gradients_in_bf16(p);
    }
}

TEST_CASE("ssd in bf16: gradients are those in float, for all sizes of heads and states") {
  for (const Index N : {8, 16, 56, 64, 72, 128})
    for (const Index per_head : {8, 32, 40, 64, 72}) {
      CAPTURE(N);
      CAPTURE(per_head);
      check_gradients_in_bf16(stored(random_problem({70}, {3}, 1, 2, per_head, N)));
    }
  // Those that products do not fit.
  for (const auto& [per_head, N] : {std::pair<Index, Index>{12, 16}, {16, 12}, {8, 136}, {7, 5}})
    check_gradients_in_bf16(stored(random_problem({70}, {3}, 1, 2, per_head, N)));
  check_gradients_in_bf16(stored(random_problem({70}, {3}, 1, 2, 16, 16)), 48);
}

TEST_CASE("ssd in bf16: gradients of groups, ragged rows, rows of no tokens and documents of one") {
  std::vector<Index> lengths{9, 0, 130, 64, 1, 65, 0}, starts{0, 2, 5, 0, 1, 1, 0};
  lengths.resize(30, 1), starts.resize(30, 0);
  starts[20] = 2;
  const Problem p = stored(random_problem(lengths, starts, 2, 4, 24, 24));
  check_gradients_in_bf16(p);
  const Cotangents of(p);
  const Result all = run<cuda, bf16>(p, true, of.y, of.h);
  CHECK(run<cuda, bf16>(p, true, of.y, of.h) == all);
  const Index D = p.channels(), size = D * p.states;
  for (Index row = 0, begin = 0; row < p.rows; begin += p.lengths[row++]) {
    CAPTURE(row);
    const Values d_h0 = part_of(all.d_h0, row * size, size), d_h = part_of(of.h, row * size, size);
    if (p.lengths[row] == 0) {
      for (Index i = 0; i < size; ++i) REQUIRE(d_h0[i] == static_cast<float>(d_h[i]));  // kept
      continue;
    }
    if (p.starts[row] == 0) CHECK(d_h0 == Values(d_h0.size()));
    // Each row alone gives the same bits.
    const Result alone = run<cuda, bf16>(row_of(p, row), true, part_of(of.y, begin * D, p.lengths[row] * D), d_h);
    CHECK(alone.d_u == part_of(all.d_u, begin * D, p.lengths[row] * D));
    CHECK(alone.d_delta == part_of(all.d_delta, begin * p.heads, p.lengths[row] * p.heads));
    CHECK(alone.d_h0 == d_h0);
  }
}

TEST_CASE("ssd in bf16: gradients where a block takes several heads, some of them fewer than others") {
  std::vector<Index> lengths(70), starts(70);
  for (Index row = 0; row < 70; ++row) lengths[row] = 3 + row % 7 * 11;
  const Problem p = stored(random_problem(lengths, starts, 2, 94, 8, 16));
  check_gradients_in_bf16(p);
}

TEST_CASE("ssd in bf16: gradients of strong decays, weak ones after them, and the least dt") {
  Problem p = random_problem({128}, {3}, 1, 2, 16, 16);
  for (double& value : p.A_log) value += 2.5;  // A near -12
  for (Index t = 0; t < 128; ++t)
    for (Index h = 0; h < p.heads; ++h) p.delta[t * p.heads + h] += t % 64 < 40 ? 30 : -6;
  p = stored(p);
  const Cotangents of(p);
  for (const double dt_min : {0.0, 0.5}) {
    p.dt_min = dt_min;
    Result got = run<cuda, bf16>(p, true, of.y, of.h), exact = run<cuda, float>(p, true, of.y, of.h);
    got.d_h0 = exact.d_h0;  // nothing reaches the initial state
    check_gradients(got, exact, of_bf16, of_bf16_sums);
  }
}

TEST_CASE("ssd in bf16: gradients of strided views, to strided views") {
  const Problem p = stored(random_problem({100, 33}, {0, 2}, 2, 4, 16, 24));
  const Cotangents of(p);
  const Index tokens = p.tokens(), N = p.states, D = p.channels(), H = p.heads, G = p.groups;
  const Result contiguous = run<cuda, bf16>(p, true, of.y, of.h), exact = run<cuda, float>(p, true, of.y, of.h);
  for (const Index padding : {8, 3}) {
    Context<cuda> ctx;
    using M = zamba::testing::PaddedMatrix<cuda, bf16>;
    const M u(p.u, tokens, padding), delta(p.delta, tokens, padding), B(p.B, tokens, padding), C(p.C, tokens, padding),
        y(nans(p.u.size()), tokens, padding), dy(of.y, tokens, padding), d_u(nans(p.u.size()), tokens, padding),
        d_delta(nans(p.delta.size()), tokens, padding), d_B(nans(p.B.size()), tokens, padding),
        d_C(nans(p.C.size()), tokens, padding);
    const Array<cuda, float> A_log(p.A_log), skip(p.D), bias(p.dt_bias), h(p.h0), dh(of.h), d_A_log(Values(p.D.size())),
        d_D(Values(p.D.size())), d_bias(Values(p.D.size()));
    const Index offsets[] = {0, 100, 133};
    const Sequences sequences{ctx.readable(offsets, 3), ctx.readable(p.starts.data(), 2), 2, tokens, 100};
    const Index kept_states = ssd_checkpoint_count(sequences);
    const Array<cuda, float> kept(nans(static_cast<std::size_t>(kept_states * N * D)));
    const SsdInputs<bf16, float> in{u.view(),
                                    delta.view(),
                                    split_heads<const bf16>(B.view(), G),
                                    split_heads<const bf16>(C.view(), G),
                                    A_log.view(H),
                                    skip.view(H),
                                    bias.view(H)};
    ssd(ctx, in, sequences, h.view(2, N, D), y.view(), kept.view(kept_states, N, D));
    const SsdGradients<bf16, float> gradients{
        d_u.view(),  d_delta.view(), split_heads(d_B.view(), G), split_heads(d_C.view(), G), d_A_log.view(H),
        d_D.view(H), d_bias.view(H)};
    ssd_backward(ctx, dy.view(), in, sequences, kept.view(kept_states, N, D), gradients, dh.view(2, N, D));
    Result got = contiguous;
    got.d_u = d_u.values(), got.d_delta = d_delta.values(), got.d_B = d_B.values(), got.d_C = d_C.values();
    got.d_A_log = d_A_log.values(), got.d_D = d_D.values(), got.d_dt_bias = d_bias.values(), got.d_h0 = dh.values();
    if (padding == 8)
      CHECK(got == contiguous);
    else
      check_gradients(got, exact, of_bf16, of_bf16_sums);
  }
}

TEST_CASE("ssd with more states than CUDA has room for") {
  CHECK_THROWS_WITH_AS((run<cuda, float>(random_problem({1}, {0}, 1, 1, 1, 513), false)),
                       "zamba: ssd: on CUDA d_state is at most 512, got 513", Error);
}

}  // namespace
