// SPDX-License-Identifier: MIT
#include <zamba/ops/linear.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>, On<cuda, bf16>
#include "linear.cpp"

namespace {

/// All gradients, by a context whose arena has been used before.
template <class A>
std::vector<Values> gradients(Extents e, Index taken_before) {
  using F = compute_t<A>;
  Context<cuda> ctx;
  ctx.arena().template tensor<std::byte>(taken_before);
  const Array<cuda, A> x(normal_values(e.tokens * e.in, 1)), weight(normal_values(e.out * e.in, 2));
  const Array<cuda, A> d_y(normal_values(e.tokens * e.out, 3)), d_x(normal_values(e.tokens * e.in, 4));
  const Array<cuda, F> d_weight(normal_values(e.out * e.in, 5)), d_bias(normal_values(e.out, 6));
  linear_backward(ctx, d_y.view(e.tokens, e.out), x.view(e.tokens, e.in), weight.view(e.out, e.in),
                  d_x.view(e.tokens, e.in), Accumulate::yes, d_weight.view(e.out, e.in), d_bias.view(e.out));
  return {d_x.values(), d_weight.values(), d_bias.values()};
}

TEST_CASE_TEMPLATE("linear: a rerun of gradients is bit-equal, on another context and after other allocations", A,
                   float, double, bf16) {
  // The second is one whose sum over the tokens is long beside its other extents.
  for (const Extents e : {Extents{700, 264, 520}, Extents{4099, 40, 72}})
    CHECK(gradients<A>(e, 5 << 20) == gradients<A>(e, 1));
}

}  // namespace
