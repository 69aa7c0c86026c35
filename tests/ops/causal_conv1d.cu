// SPDX-License-Identifier: MIT
#include <zamba/ops/causal_conv1d.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "causal_conv1d.cpp"

namespace {

/// Rows of 0 to 6 tokens, with and without a past, and one longer one.
Problem short_rows(Index channels, Index width, Index tokens) {
  std::vector<Index> lengths{40}, starts{3};
  for (Index row = 0, sum = 40; sum < tokens; ++row) {
    lengths.push_back((row * 5 + row / 7) % 7);
    starts.push_back(row % 3);
    sum += lengths.back();
  }
  return random_problem(channels, width, std::move(lengths), std::move(starts));
}

TEST_CASE("causal_conv1d on CUDA: a thread's group of tokens has many rows, or ends among a row's first tokens") {
  // Enough elements for groups of some tokens, on GPUs of up to 200 multiprocessors.
  for (const Index channels : {517, 520}) {  // single elements, and pieces of 16 bytes
    Problem p = short_rows(channels, 4, channels % 4 ? 1300 : 4800);
    p.d_state.clear();
    const Result on_cpu = run<cpu, float>(p), on_cuda = run<cuda, float>(p);
    CHECK(relative_error(on_cuda.out, on_cpu.out) < On<cuda, float>::tolerance);
    CHECK(on_cuda.state == on_cpu.state);
    CHECK(relative_error(on_cuda.d_x, on_cpu.d_x) < On<cuda, float>::tolerance);
  }
}

TEST_CASE("causal_conv1d on CUDA: single tokens of any number of rows give the bits of a batch with a longer row") {
  // 2500 rows of 520 channels are more than the GPU takes at once, so a block has several of them; some have no token.
  for (const Index channels : {5, 520})
    for (const Index rows : {1, 3, 70, 2500}) {
      CAPTURE(channels);
      CAPTURE(rows);
      std::vector<Index> lengths, starts;
      for (Index row = 0; row < rows; ++row) {
        lengths.push_back(row % 7 != 5);
        starts.push_back(row % 3);
      }
      const Problem p = random_problem(channels, 4, lengths, starts);
      const Result on_cpu = run<cpu, float>(p), on_cuda = run<cuda, float>(p);
      CHECK(relative_error(on_cuda.out, on_cpu.out) < On<cuda, float>::tolerance);
      CHECK(on_cuda.state == on_cpu.state);
      Problem longer = p;
      longer.lengths.push_back(2);
      longer.starts.push_back(0);
      longer.x.insert(longer.x.end(), static_cast<std::size_t>(2 * channels), 0.5);
      longer.state.insert(longer.state.end(), static_cast<std::size_t>(3 * channels), nan);
      const Result together = run<cuda, float>(longer);
      CHECK(on_cuda.out == part(together.out, 0, std::ssize(on_cuda.out)));
      CHECK(on_cuda.state == part(together.state, 0, std::ssize(on_cuda.state)));
      Problem stateless = p, fresh = p;
      stateless.state.clear();
      fresh.starts.assign(fresh.starts.size(), 0);
      CHECK(run<cuda, float>(stateless).out == run<cuda, float>(fresh).out);
    }
}

TEST_CASE("causal_conv1d on CUDA: wide loads and single elements give the same bits, in every type") {
  for (const Index padding : {0, 8}) {
    Problem p = short_rows(72, 4, 90);
    p.padding = padding;
    Problem single = p;
    single.padding = 3;
    CHECK(run<cuda, float>(p) == run<cuda, float>(single));
    CHECK(run<cuda, double>(p) == run<cuda, double>(single));
    CHECK(run<cuda, bf16>(p) == run<cuda, bf16>(single));
  }
}

TEST_CASE("causal_conv1d in bf16 is that in float, rounded where it is written") {
  for (const Index width : {4, 3}) {
    Problem p = short_rows(72, width, 200);
    for (Values* values : {&p.x, &p.d_out})
      for (double& value : *values) value = bf16(static_cast<float>(value));
    const Result exact = run<cuda, float>(p), stored = run<cuda, bf16>(p);
    CHECK(relative_error(stored.out, exact.out) < 0x1p-9);  // 8 bits: at most 2^-9 of each element
    CHECK(relative_error(stored.d_x, exact.d_x) < 0x1p-9);
    // The others are kept in float, and computed from the same numbers in the same order.
    CHECK(stored.state == exact.state);
    CHECK(stored.d_weight == exact.d_weight);
    CHECK(stored.d_bias == exact.d_bias);
    CHECK(stored.d_state == exact.d_state);
  }
}

TEST_CASE("causal_conv1d on CUDA, backward: groups of tokens that begin and end anywhere in rows") {
  // Rows about as long as the window, as the loads under way, and of many groups: 1056 / ceil(D / 256) of them, of 16
  // tokens or more; documents of length 1, and rows without a token between others.
  struct Rows {
    Index channels;
    std::vector<Index> lengths;
  };
  std::vector<Index> ones(40, 1);
  for (const Rows& rows :
       {Rows{8, {1}}, Rows{8, {2}}, Rows{12, {3, 0, 4, 5}}, Rows{6, {7, 16, 17, 0, 0, 31}}, Rows{520, {4099}},
        Rows{516, {33, 0, 2048, 1, 1, 600}}, Rows{300, ones}, Rows{7424, {100, 3, 190}}, Rows{517, {515, 2}}}) {
    for (const Index width : {4, 3}) {
      if (width == 3 && rows.channels > 600) continue;
      CAPTURE(rows.channels);
      CAPTURE(width);
      std::vector<Index> starts;
      for (std::size_t row = 0; row < rows.lengths.size(); ++row) starts.push_back(static_cast<Index>(row % 2) * 5);
      const Problem p = random_problem(rows.channels, width, rows.lengths, starts);
      const Result exact = run<cpu, double>(p), got = run<cuda, float>(p), twin = run<cuda, double>(p);
      CHECK(relative_error(got.d_x, exact.d_x) < On<cuda, float>::tolerance);
      CHECK(relative_error(got.d_state, exact.d_state) < On<cuda, float>::tolerance);
      CHECK(relative_error(got.d_weight, exact.d_weight) < 4e-6);  // 4,099 terms: their root times 2^-24
      CHECK(relative_error(got.d_bias, exact.d_bias) < 4e-6);
      CHECK(relative_error(twin.d_x, exact.d_x) < 1e-14);
      CHECK(relative_error(twin.d_weight, exact.d_weight) < 1e-14);
      CHECK(relative_error(twin.d_bias, exact.d_bias) < 1e-14);
      CHECK(relative_error(twin.d_state, exact.d_state) < 1e-14);
      CHECK(run<cuda, float>(p) == got);
      CHECK(run<cuda, bf16>(p) == run<cuda, bf16>(p));
    }
  }
}

TEST_CASE("causal_conv1d on CUDA: no tokens, no state, outputs far out") {
  Problem p = random_problem(16, 4, {0}, {2});
  const Result none = run<cuda, float>(p);
  CHECK(none.out.empty());
  CHECK(none.state.size() == p.state.size());
  p = random_problem(16, 4, {9}, {2});
  p.state.clear();
  Problem fresh = random_problem(16, 4, {9}, {0});
  CHECK(run<cuda, float>(p).out == run<cuda, float>(fresh).out);
  for (double& value : p.x) value *= 200;  // the sigmoid is 0 or 1
  const Result far = run<cuda, float>(p);
  CHECK(relative_error(far.out, run<cpu, float>(p).out) < On<cuda, float>::tolerance);
}

}  // namespace
