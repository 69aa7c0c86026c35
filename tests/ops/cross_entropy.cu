// SPDX-License-Identifier: MIT
#include <zamba/ops/cross_entropy.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>, On<cuda, bf16>
#include "cross_entropy.cpp"

namespace {

struct Result {
  LossSum loss;
  Values d_h, d_head;
};

/// Positions in so many calls of equal size, by a context whose arena has been used before.
template <class A>
Result in_calls(Index n, Index width, Index vocabulary, Index calls, Index taken_before) {
  using F = compute_t<A>;
  Context<cuda> ctx;
  ctx.arena().template tensor<std::byte>(taken_before);
  const Array<cuda, A> h(normal_values(n * width, 1)), head(normal_values(vocabulary * width, 2));
  const Array<cuda, A> d_h(nans(static_cast<std::size_t>(n * width)));
  const Array<cuda, F> d_head{Values(static_cast<std::size_t>(vocabulary * width))};
  const auto targets = on_device<cuda>(random_targets(n, vocabulary));
  Result result;
  for (Index first = 0; first < n; first += n / calls) {
    const auto part = [&](const Array<cuda, A>& all) { return all.view(n, width).slice(first, n / calls); };
    const LossSum loss =
        cross_entropy_backward(ctx, part(h), head.view(vocabulary, width), targets.view(n).data + first, 0.01,
                               part(d_h), d_head.view(vocabulary, width));
    result.loss.sum += loss.sum;
    result.loss.count += loss.count;
  }
  result.d_h = d_h.values(), result.d_head = d_head.values();
  return result;
}

TEST_CASE_TEMPLATE("cross_entropy: more positions than one tile holds on CUDA", A, float, bf16) {
  // 191 positions a tile.
  const Result whole = in_calls<A>(402, 4, 700001, 1, 1), parts = in_calls<A>(402, 4, 700001, 3, 1);
  CHECK(whole.loss.count == parts.loss.count);
  CHECK(std::abs(whole.loss.sum - parts.loss.sum) <= rounding_of_loss<A> * parts.loss.sum);
  CHECK(relative_error(whole.d_h, parts.d_h) <= rounding<A>);
  CHECK(relative_error(whole.d_head, parts.d_head) <= rounding<A>);
}

TEST_CASE_TEMPLATE("cross_entropy: a rerun is bit-equal, on another context and after other allocations", A, float,
                   double, bf16) {
  const Result one = in_calls<A>(1000, 72, 1003, 1, 1), other = in_calls<A>(1000, 72, 1003, 1, 5 << 20);
  CHECK(one.loss.sum == other.loss.sum);
  CHECK(one.d_h == other.d_h);
  CHECK(one.d_head == other.d_head);
}

}  // namespace
