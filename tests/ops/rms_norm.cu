// SPDX-License-Identifier: MIT
#include <zamba/ops/rms_norm.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "rms_norm.cpp"

namespace {

TEST_CASE("rms_norm in bf16 is that in float, rounded where it is written") {
  const Index n = 9, d = 300;
  const auto stored = [](Values values) {
    for (double& value : values) value = bf16(static_cast<float>(value));
    return values;
  };
  const Values x = stored(normal_values(n * d, 1)), t = stored(normal_values(n * d, 2));
  const Values d_out = stored(normal_values(n * d, 3)), weight = normal_values(d, 4), zeros(x.size());
  const Result exact = run<On<cuda, float>>(x, t, weight, d_out, n, 1e-5);
  Context<cuda> ctx;
  const PaddedMatrix<cuda, bf16> x_(x, n), t_(t, n), dy(d_out, n), out(zeros, n), d_x(zeros, n), d_t(zeros, n);
  const PaddedMatrix<cuda, float> w(weight, 1), rstd(Values(n), 1), d_w(Values(d), 1);
  rms_norm(ctx, x_.view(), t_.view(), w.vector(), 1e-5, out.view(), rstd.vector());
  rms_norm_backward(ctx, dy.view(), x_.view(), t_.view(), w.vector(), rstd.vector(), d_x.view(), d_t.view(),
                    d_w.vector());
  // 8 bits: at most 2^-9 of each element.
  CHECK(relative_error(out.values(), exact.out) < 0x1p-9);
  CHECK(relative_error(d_x.values(), exact.d_x) < 0x1p-9);
  CHECK(d_t.values() == d_x.values());
  CHECK(relative_error(rstd.values(), exact.rstd) < On<cuda, float>::tolerance);
  CHECK(relative_error(d_w.values(), exact.d_weight) < On<cuda, float>::tolerance);
}

TEST_CASE("rms_norm in bf16: widths about what a block of threads holds, in pieces of 16 bytes or not") {
  // 8 bits: at most 2^-8 of each element.
  for (const Index d : {8, 16, 1000, 4096, 4112, 8192, 8208, 8193}) check_forward<On<cuda, bf16>>(2, d, 8, 0x1p-8);
  for (const Index d : {16, 4096, 4112}) check_forward<On<cuda, bf16>>(2, d, 3, 0x1p-8);
  check_forward<On<cuda, bf16>>(1027, 16, 0, 0x1p-8);
}

TEST_CASE_TEMPLATE("rms_norm: more positions than a GPU holds at a time, which a block takes in turn", Where,
                   On<cuda, float>, On<cuda, double>, On<cuda, bf16>) {
  const double tolerance = sizeof(typename Where::type) == 2   ? 0x1p-8
                           : sizeof(typename Where::type) == 8 ? 1e-14
                                                               : 1e-6;
  check_forward<Where>(2700, 16, 8, tolerance);
  check_forward<Where>(1000, 4112, 8, tolerance);  // for twice as many threads
  check_forward<Where>(3, 2064, 0, tolerance);     // beyond what few threads hold in double
}

/// The gradients of stored numbers against those on the CPU in double, and of their rerun bit by bit.
template <class Where>
void check_backward(Index n, Index d, Index padding) {
  using T = typename Where::type;
  CAPTURE(n);
  CAPTURE(d);
  CAPTURE(padding);
  const auto stored = [](Values values) {
    for (double& value : values) value = static_cast<T>(static_cast<compute_t<T>>(value));
    return values;
  };
  const Values x = stored(normal_values(n * d, 1)), t = stored(normal_values(n * d, 2)), none;
  const Values d_out = stored(normal_values(n * d, 3)), weight = normal_values(d, 4);
  // Gradients are rounded once, to half a unit of 8 bits in bf16; d_weight sums up to 4,099 terms: their root times
  // 2^-24. rstd is within 1e-6 of itself in float.
  const double element = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 2 ? 0x1p-9 : 2e-6, sum = sizeof(T) == 8 ? 1e-13 : 4e-6;
  const auto check = [&](const Result& got, const Result& again, const Result& exact) {
    CHECK(relative_error(got.d_x, exact.d_x) < element);
    CHECK(relative_error(got.d_weight, exact.d_weight) < sum);
    CHECK(got.d_t.size() == exact.d_t.size());
    if (!got.d_t.empty()) CHECK(got.d_t == got.d_x);
    CHECK(again == got);
  };
  for (const Values& second : {none, t}) {
    const auto on_cuda = [&] { return run<Where>(x, second, weight, d_out, n, 1e-5, padding); };
    check(on_cuda(), on_cuda(), run<On<cpu, double>>(x, second, weight, d_out, n, 1e-5));
  }
  if (d % 2) return;
  const auto on_cuda = [&] { return run_concat<Where>(x, weight, d_out, n, padding); };
  check(on_cuda(), on_cuda(), run_concat<On<cpu, double>>(x, weight, d_out, n, 0));
}

TEST_CASE_TEMPLATE("rms_norm on CUDA, backward: widths about what a block holds, positions that it takes in turn",
                   Where, On<cuda, float>, On<cuda, double>, On<cuda, bf16>) {
  for (const Index d : {8, 16, 1000, 1024, 1040, 4096, 4112, 8192, 8208, 8193}) check_backward<Where>(3, d, 0);
  for (const Index d : {16, 1000, 4112}) check_backward<Where>(5, d, 8);
  for (const Index d : {16, 1000, 4112}) check_backward<Where>(5, d, 3);
  check_backward<Where>(4099, 32, 0);
  check_backward<Where>(1100, 1032, 0);
  check_backward<Where>(300, 4112, 0);
}

TEST_CASE("rms_norm on CUDA: vectors and single elements give the same gradients, bit by bit") {
  for (const Index d : {16, 1024, 1040, 4112}) {
    const Index n = 37;
    const Values x = normal_values(n * d, 1), t = normal_values(n * d, 2), d_out = normal_values(n * d, 3);
    const Values weight = normal_values(d, 4);
    const Result vectors = run<On<cuda, bf16>>(x, t, weight, d_out, n, 1e-5);
    CHECK(run<On<cuda, bf16>>(x, t, weight, d_out, n, 1e-5, 8) == vectors);
    CHECK(run<On<cuda, bf16>>(x, t, weight, d_out, n, 1e-5, 5) == vectors);
  }
}

TEST_CASE("rms_norm of no positions launches nothing") {
  Context<cuda> ctx;
  const PaddedMatrix<cuda, float> weight({1, 2}, 1), d_weight({3, 4}, 1);
  const Matrix<float> none(nullptr, 0, 2);
  rms_norm(ctx, none, {}, weight.vector(), 1e-5, none, Vector<float>());
  rms_norm_backward(ctx, none, none, {}, weight.vector(), Vector<float>(), none, {}, d_weight.vector());
  CHECK(d_weight.values() == Values{3, 4});
}

}  // namespace
