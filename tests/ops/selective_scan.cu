// SPDX-License-Identifier: MIT
#include <zamba/ops/selective_scan.cuh>

#include <utility>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "selective_scan.cpp"

namespace {

TEST_CASE("selective_scan in bf16 is that in float, rounded where it is written") {
  Problem p = random_problem({130, 0, 7}, {0, 1, 5});
  for (Values* values : {&p.u, &p.delta, &p.z, &p.B, &p.C})
    for (double& value : *values) value = bf16(static_cast<float>(value));
  const Result exact = run<cuda, float>(p, true), stored = run<cuda, bf16>(p, true);
  CHECK(relative_error(stored.y, exact.y) < 0x1p-9);  // 8 bits: at most 2^-9 of each element
  CHECK(relative_error(stored.h, exact.h) < 1e-6);
}

TEST_CASE("selective_scan keeps on CUDA the states that it keeps on the CPU") {
  const Problem p = random_problem({64, 150, 1}, {0, 2, 0}, 2, 70, 16);
  const Values on_cpu = run<cpu, float>(p, true).kept, on_cuda = run<cuda, float>(p, true).kept;
  REQUIRE(on_cuda.size() == on_cpu.size());
  Values a, b;
  for (std::size_t i = 0; i < on_cpu.size(); ++i) {
    REQUIRE(std::isinf(on_cuda[i]) == std::isinf(on_cpu[i]));  // what no chunk begins with stays unset
    if (std::isinf(on_cpu[i])) continue;
    a.push_back(on_cuda[i]);
    b.push_back(on_cpu[i]);
  }
  CHECK(a.size() == 5u * 16 * 140);  // 1 + 3 + 1 chunks
  CHECK(relative_error(a, b) < On<cuda, float>::definition);
}

/// Against the definition in float64, and the same bits in a batch as alone, in y and in the state.
template <class T>
void check_rows(const Problem& p, double bound) {
  const Result together = run<cuda, T>(p, true);
  CHECK(relative_error(together.y, plain_scan(p)) < bound);
  const auto part = [](const Values& values, Index first, Index count) {
    return Values(values.begin() + first, values.begin() + first + count);
  };
  const Index of_state = p.states * p.channels, of_BC = p.heads * p.states;
  for (Index row = 0, first = 0; row < p.rows; first += p.lengths[row++]) {
    CAPTURE(row);
    Problem alone = p;
    alone.rows = 1;
    alone.lengths = {p.lengths[row]};
    alone.starts = {p.starts[row]};
    for (auto [to, from] : {std::pair{&alone.u, &p.u}, {&alone.delta, &p.delta}, {&alone.z, &p.z}})
      *to = part(*from, first * p.channels, p.lengths[row] * p.channels);
    alone.B = part(p.B, first * of_BC, p.lengths[row] * of_BC);
    alone.C = part(p.C, first * of_BC, p.lengths[row] * of_BC);
    alone.h0 = part(p.h0, row * of_state, of_state);
    const Result single = run<cuda, T>(alone, true);
    CHECK(single.y == part(together.y, first * p.channels, p.lengths[row] * p.channels));
    CHECK(single.h == part(together.h, row * of_state, of_state));
  }
}

TEST_CASE("selective_scan on CUDA: the edges of its tiles, slices and groups of tokens") {
  const double bound = On<cuda, float>::definition;
  // Lengths around 8 and 16 tokens; heads of less than, of and of more than 32 and 64 channels, in fours or not.
  for (const Index per_head : {1, 4, 31, 32, 36, 63, 64, 65, 68})
    for (const Index N : {1, 4, 15, 16, 17, 32}) {
      CAPTURE(per_head);
      CAPTURE(N);
      check_rows<float>(random_problem({7, 8, 0, 9, 15, 16, 17, 33}, {1, 0, 2, 0, 3, 0, 9, 4}, 2, per_head, N), bound);
    }
}

TEST_CASE("selective_scan on CUDA: for few blocks and for many, the same bits") {
  // As one row the problem has fewer blocks than two a multiprocessor, together with the others more.
  std::vector<Index> lengths, starts;
  for (Index row = 0; row < 140; ++row) {
    lengths.push_back(row % 3 == 0 ? 2 + row % 20 : row % 2);
    starts.push_back(row % 4);
  }
  for (const Index per_head : {4, 5})
    check_rows<float>(random_problem(lengths, starts, 2, per_head, 16), On<cuda, float>::definition);
}

TEST_CASE("selective_scan on CUDA: single tokens of any number of rows are the tokens of a longer row") {
  // Few and many rows: one channel a lane or four, one row a block or several. Heads in fours or not, and of a part of
  // a tile; slices of four states and of eight, full and not.
  struct Shape {
    Index rows, heads, per_head, N;
  };
  for (const auto [rows, heads, per_head, N] :
       {Shape{1, 1, 36, 5}, Shape{1, 2, 36, 16}, Shape{3, 1, 35, 32}, Shape{3, 1, 36, 17}, Shape{1100, 1, 36, 20},
        Shape{2200, 2, 4, 16}, Shape{2200, 1, 68, 16}, Shape{2200, 1, 35, 12}}) {
    CAPTURE(rows);
    CAPTURE(per_head);
    CAPTURE(N);
    std::vector<Index> lengths(static_cast<std::size_t>(rows), 1), starts(lengths.size());
    for (Index row = 0; row < rows; ++row) starts[row] = row % 3, lengths[row] = row % 7 == 6 ? 0 : 1;
    const Problem p = random_problem(lengths, starts, heads, per_head, N);
    const Result tokens = run<cuda, float>(p, true, {}, {}, 1, false);
    CHECK(relative_error(tokens.y, plain_scan(p)) < On<cuda, float>::definition);
    // With states kept, the kernel of longer rows runs.
    const Result longer = run<cuda, float>(p, true);
    CHECK(tokens.y == longer.y);
    CHECK(tokens.h == longer.h);
    if (rows == 2200) CHECK(run<cuda, bf16>(p, true, {}, {}, 1, false).y == run<cuda, bf16>(p, true).y);
  }
}

TEST_CASE("selective_scan on CUDA in bf16: wide loads and single elements, the same bits") {
  // The same channels as two heads of 36, in fours, and as the first 36 of each of two heads of 37.
  Problem p = random_problem({40, 3, 1}, {0, 2, 5}, 2, 36, 16);
  for (Values* values : {&p.u, &p.delta, &p.z, &p.B, &p.C})
    for (double& value : *values) value = bf16(static_cast<float>(value));
  Problem odd = p;
  odd.channels = 74;
  const auto widened = [](const Values& from, Index inner) {  // (n, 36, inner) to (n, 37, inner)
    Values to;
    for (std::size_t i = 0; i < from.size(); i += 36 * inner) {
      to.insert(to.end(), from.begin() + i, from.begin() + i + 36 * inner);
      to.insert(to.end(), inner, 0.5);
    }
    return to;
  };
  for (auto [to, from] : {std::pair{&odd.u, &p.u},
                          {&odd.delta, &p.delta},
                          {&odd.z, &p.z},
                          {&odd.D, &p.D},
                          {&odd.delta_bias, &p.delta_bias},
                          {&odd.h0, &p.h0}})
    *to = widened(*from, 1);
  odd.A_log = widened(p.A_log, 16);
  const Result wide = run<cuda, bf16>(p, true), narrow = run<cuda, bf16>(odd, true);
  for (Index i = 0; i < p.tokens() * 2; ++i)
    for (Index c = 0; c < 36; ++c) REQUIRE(wide.y[i * 36 + c] == narrow.y[i * 37 + c]);
  for (Index i = 0; i < p.rows * 16 * 2; ++i)
    for (Index c = 0; c < 36; ++c) REQUIRE(wide.h[i * 36 + c] == narrow.h[i * 37 + c]);
}

TEST_CASE("selective_scan on CUDA: inputs far out, and decays of nothing and of everything") {
  Problem p = random_problem({20}, {1}, 1, 8, 16);
  for (Index i = 0; i < p.tokens() * 8; ++i) {
    p.delta[i] += i % 5 == 0 ? -60 : i % 7 == 0 ? 40 : 0;
    p.z[i] *= i % 11 == 0 ? 100 : 1;
  }
  for (Index i = 0; i < 8 * 16; ++i) p.A_log[i] = i % 9 == 0 ? 100 : i % 10 == 0 ? -100 : p.A_log[i];
  // By norm, over outputs of up to some thousands; each of them also is a number.
  const Result result = run<cuda, float>(p, true);
  CHECK(relative_error(result.y, plain_scan(p)) < On<cuda, float>::definition);
  for (const double value : result.h) REQUIRE(std::isfinite(value));
}

TEST_CASE("selective_scan without a state, and with more states than CUDA has room for") {
  const Problem p = random_problem({70, 3}, {4, 0}, 1, 12, 16);
  Problem fresh = p;
  fresh.starts = {0, 0};
  CHECK(run<cuda, float>(p, false).y == run<cuda, float>(fresh, true).y);
  CHECK_THROWS_WITH_AS((run<cuda, float>(random_problem({1}, {0}, 1, 1, 257), false)),
                       "zamba: selective_scan: on CUDA d_state is at most 256, got 257", Error);
}

/// Against the CPU in double, of inputs that are T already.
template <class T>
void check_backward(Problem p, double bound, double parameter_bound) {
  for (Values* values : {&p.u, &p.delta, &p.z, &p.B, &p.C, &p.A_log, &p.D, &p.delta_bias})
    for (double& value : *values) value = static_cast<double>(T(static_cast<compute_t<T>>(value)));
  Values d_y = cotangents(p.u.size(), 1);
  for (double& value : d_y) value = static_cast<double>(T(static_cast<compute_t<T>>(value)));
  const Values d_h = cotangents(p.h0.size(), 2);
  check_gradients(run<cuda, T>(p, true, d_y, d_h), run<cpu, double>(p, true, d_y, d_h), bound, parameter_bound);
}

// Of a gradient in float: some factors of 2e-7 each for every step that a state remembers, of which there are few here.
constexpr double backward_in_float = 4e-6;

TEST_CASE("selective_scan backward on CUDA: the edges of its tiles, slices, stages and chunks") {
  for (const Index per_head : {1, 4, 31, 32, 33, 66})
    for (const Index N : {1, 8, 15, 16, 17, 64, 128}) {
      CAPTURE(per_head);
      CAPTURE(N);
      const Problem p = random_problem({7, 8, 0, 1, 63, 66}, {1, 0, 2, 0, 3, 0}, 2, per_head, N);
      check_backward<float>(p, backward_in_float, backward_in_float);
      if (N % 16 > 0) check_backward<double>(p, 1e-13, 1e-13);
    }
}

TEST_CASE("selective_scan backward on CUDA: long rows, and packed documents of single tokens") {
  for (const Index N : {8, 16, 20}) {
    CAPTURE(N);
    check_backward<float>(random_problem({4099}, {0}, 1, 5, N), backward_in_float, backward_in_float);
    std::vector<Index> lengths, starts;
    for (Index row = 0; row < 150; ++row) {
      lengths.push_back(row % 7 == 6 ? 0 : row % 11 == 10 ? 70 : 1);
      starts.push_back(row % 3);
    }
    check_backward<float>(random_problem(lengths, starts, 2, 34, N), backward_in_float, backward_in_float);
  }
}

TEST_CASE("selective_scan backward on CUDA in bf16: as in float, rounded where it is written; a rerun is bit-equal") {
  // Of N 16 and 20: two kernels. Heads in pairs or not.
  for (const auto [per_head, N] : {std::pair<Index, Index>{36, 16}, {37, 16}, {21, 7}, {36, 20}}) {
    CAPTURE(per_head);
    CAPTURE(N);
    const Problem p = random_problem({150, 0, 9, 1}, {0, 1, 5, 0}, 2, per_head, N);
    // 8 bits: at most 2^-9 of each element, beside which parts of dB and dC with 11 bits vanish.
    check_backward<bf16>(p, 0x1p-9, backward_in_float);
    const Values d_y = cotangents(p.u.size(), 1), d_h = cotangents(p.h0.size(), 2);
    CHECK(run<cuda, bf16>(p, true, d_y, d_h) == run<cuda, bf16>(p, true, d_y, d_h));
  }
}

TEST_CASE("selective_scan backward on CUDA without states") {
  Problem p = random_problem({70, 3}, {0, 0}, 1, 12, 16);
  const Values d_y = cotangents(p.u.size(), 1);
  const Result with = run<cuda, float>(p, true, d_y, Values(p.h0.size())), without = run<cuda, float>(p, false, d_y);
  CHECK(with.d_u == without.d_u);
  CHECK(with.d_A_log == without.d_A_log);
  for (const double value : with.d_h0) REQUIRE(value == 0);  // rows that began from zero
}

}  // namespace
