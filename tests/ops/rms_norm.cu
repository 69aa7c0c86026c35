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

TEST_CASE("rms_norm of no positions launches nothing") {
  Context<cuda> ctx;
  const PaddedMatrix<cuda, float> weight({1, 2}, 1), d_weight({3, 4}, 1);
  const Matrix<float> none(nullptr, 0, 2);
  rms_norm(ctx, none, {}, weight.vector(), 1e-5, none, Vector<float>());
  rms_norm_backward(ctx, none, none, {}, weight.vector(), Vector<float>(), none, {}, d_weight.vector());
  CHECK(d_weight.values() == Values{3, 4});
}

}  // namespace
