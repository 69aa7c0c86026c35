// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#define ZAMBA_TEST_DEVICE cuda
#include "support/free_memory.hpp"
#include "workspace.cpp"

TEST_CASE("a workspace that does not fit is refused, and nothing has changed") {
  using namespace zamba_test;
  using M = Model<Hybrid, bf16, cuda>;
  const M model = random_model<Hybrid, bf16, cuda>();
  const auto tokens = random_tokens(1500);
  auto ctx = zamba::testing::new_context<cuda>(1);
  auto state = model.new_state({1, 1600});
  model.extend(ctx, state, random_tokens(3, 1));
  const auto before = state.to_bytes();

  auto taken = all_free_memory<cuda>(std::size_t{1} << 18);  // what the prompt needs is more
  std::string message;
  try {
    model.extend(ctx, state, tokens);
  } catch (const OutOfMemory& error) {
    message = error.what();
  }
  CAPTURE(message);
  CHECK(message.starts_with("zamba: extend: out of memory on cuda: "));
  CHECK(message.find(" + workspace ") != std::string::npos);
  CHECK(state.to_bytes() == before);

  taken.clear();
  auto other = model.new_state({1, 1600});
  model.extend(other, random_tokens(3, 1));
  CHECK(values<cuda>(model.extend(ctx, state, tokens)) == values<cuda>(model.extend(other, tokens)));
}

TEST_CASE("it is known before it is taken: ssd of the widths that tensor cores take, in segments of long rows") {
  check_workspace<zamba_test::SecondWide, zamba::bf16, zamba::cuda>();
}
