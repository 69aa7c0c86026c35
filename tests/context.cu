// SPDX-License-Identifier: MIT
#include <zamba/context.cuh>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/kernel/elementwise.cuh>
#include <zamba/number.hpp>

namespace {

using namespace zamba;

template <class T, int Rank>
std::vector<T> values(Tensor<T, Rank> tensor) {
  std::vector<T> host(static_cast<std::size_t>(tensor.size()));
  Memory<cuda>::copy_to_host(host.data(), tensor.data, host.size() * sizeof(T));
  return host;
}

TEST_CASE("Context<cuda>: readable, copy, fill and zero") {
  Context<cuda> ctx;
  std::vector<Index> host{5, 6, 7};
  const Tensor<const Index, 1> there(ctx.readable(host.data(), 3), 3);
  host = {0, 0, 0};  // taken over already
  const auto copied = ctx.arena().tensor<Index>(3);
  ctx.copy(there, copied);
  CHECK(values(copied) == std::vector<Index>{5, 6, 7});

  const auto x = ctx.arena().tensor<float>(3, 1000);
  ctx.fill(x, std::numeric_limits<float>::quiet_NaN());
  ctx.zero(x.slice(1, 1));
  const auto read = values(x);
  CHECK(std::isnan(read[999]));
  CHECK(read[1000] == 0);
  CHECK(read[1999] == 0);
  CHECK(std::isnan(read[2000]));
  const auto half = ctx.arena().tensor<bf16>(2);
  ctx.fill(half, bf16(1.5f));
  CHECK(float(values(half)[1]) == 1.5f);
  ctx.fill(half.slice(0, 0), bf16(0));  // of nothing
}

TEST_CASE("Context<cuda>: copies without a context see what a context computed before, and not after") {
  Context<cuda> first, second;
  const Index count = 1 << 24;
  const auto x = first.arena().tensor<float>(count), y = second.arena().tensor<float>(count);
  const auto last = second.arena().tensor<float>(1);
  for (int i = 1; i <= 20; ++i) {
    first.fill(x, static_cast<float>(i));
    Memory<cuda>::copy(y.data, x.data, static_cast<std::size_t>(count) * sizeof(float));
    first.zero(x);
    second.copy(y.slice(count - 1, 1), last);
    REQUIRE(values(last)[0] == static_cast<float>(i));
  }
}

TEST_CASE("Context<cuda>: scratch is reused once it has been given back") {
  Context<cuda> ctx;
  const auto take = [&] {
    ArenaScope scope(ctx.arena());
    ctx.zero(ctx.arena().tensor<float>(1000, 1000));
    ctx.zero(ctx.arena().tensor<float>(2000, 1000));
  };
  take();
  const std::size_t capacity = ctx.arena().capacity();
  take();
  CHECK(ctx.arena().capacity() == capacity);
}

/// Writes numbers that grow by 1 from `first` on.
struct Count {
  int* to;
  int first;
  __device__ void operator()(Index, Index i) const { to[i] = first + static_cast<int>(i); }
};

TEST_CASE("Context<cuda>: what kernels leave in pinned memory is there at the event that was recorded") {
  Context<cuda> ctx;
  const Index count = 1 << 16;
  int* mail = ctx.pinned_buffer<int>(2 * count);
  CHECK(ctx.pinned_buffer<int>(4) == mail);
  for (int round = 0; round < 20; ++round) {  // the next is queued before this one is read
    const int turn = round % 2;
    kernel::for_elements(ctx, 1, count, Count{mail + turn * count, 1000 * round}, "count");
    ctx.record_event(turn);
    if (round == 0) continue;
    const int* before = mail + (1 - turn) * count;
    ctx.synchronize_event(1 - turn);
    CHECK(before[0] == 1000 * (round - 1));
    CHECK(before[count - 1] == 1000 * (round - 1) + count - 1);
  }
}

TEST_CASE("Context<cuda>: a step without input is recorded once for a key, and anew where its scratch lies elsewhere") {
  Context<cuda> ctx;
  int* mail = ctx.pinned_buffer<int>(4);
  static constexpr char program = 0;
  int runs = 0;
  const auto step = [&] {
    ctx.launch_graph({&program, {mail}, {}}, {}, [&](const StepInput& input) {
      CHECK(input.tokens.empty());
      ++runs;
      ArenaScope scope(ctx.arena());
      ctx.zero(ctx.arena().tensor<float>(100));
      kernel::for_elements(ctx, 1, 4, Count{mail, 7}, "count");
    });
  };
  const ArenaScope scope(ctx.arena());
  for (int i = 0; i < 5; ++i) step();
  CHECK(runs == 2);  // once as it is, once to record
  CHECK(ctx.recorded() == 1);
  const auto taken = ctx.arena().tensor<float>(64);
  step();
  step();
  CHECK(runs == 4);
  CHECK(ctx.recorded() == 2);
  std::fill_n(mail, 4, 0);
  step();
  ctx.synchronize();
  CHECK(mail[3] == 10);
  CHECK(taken.data != nullptr);
}

TEST_CASE("Context<cuda>: a step's input comes whole, into a graph too") {
  Context<cuda> ctx;
  static constexpr char program = 0;
  const auto sum = ctx.arena().tensor<Index>(8);
  for (Index round = 0; round < 5; ++round) {
    const std::vector<Index> offsets{0, 1, 2}, starts{round, 7};
    const std::vector<Token> tokens{static_cast<Token>(10 + round), 5};
    ctx.launch_graph({&program, {sum.data}, {2}}, {offsets, starts, tokens}, [&](const StepInput& there) {
      const auto copy = [&](std::span<const Index> from, Index at) {
        const Index count = static_cast<Index>(from.size());
        ctx.copy(Vector<const Index>(from.data(), count), sum.slice(at, count));
      };
      copy(there.offsets, 0);
      copy(there.starts, 3);
      ctx.copy(Vector<const Token>(there.tokens.data(), 2), Vector<Token>(reinterpret_cast<Token*>(&sum[5]), 2));
    });
    const auto got = values(sum);
    CHECK(std::vector<Index>(got.begin(), got.begin() + 5) == std::vector<Index>{0, 1, 2, round, 7});
    Token there[2];
    std::memcpy(there, &got[5], sizeof there);
    CHECK(there[0] == 10 + round);
    CHECK(there[1] == 5);
  }
  CHECK(ctx.recorded() == 1);
}

TEST_CASE("CUDA's errors are exceptions that name the call, and are reported once") {
  Context<cuda> ctx;
  std::string message;
  try {
    Buffer<cuda> buffer(std::size_t{1} << 50);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find("zamba: cudaMalloc: out of memory: 1125899906842624 bytes wanted, ") == 0);
  const auto x = ctx.arena().tensor<float>(4);
  CHECK_NOTHROW(ctx.fill(x, 1.0f));
  CHECK_THROWS_AS(ctx.arena().tensor<float>(Index{1} << 48), Error);
  CHECK_NOTHROW(ctx.synchronize());
  CHECK(values(x)[3] == 1);

  std::vector<float> host(4);
  CHECK_THROWS_WITH_AS(kernel::check_cuda(cudaErrorInvalidValue, "fill"),
                       "zamba: fill: invalid argument (cudaErrorInvalidValue)", Error);
}

}  // namespace
