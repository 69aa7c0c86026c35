// SPDX-License-Identifier: MIT
// What a step of training takes is what training_bytes says.
#include "tests/support/training_bytes.hpp"

namespace {

using namespace zamba_test;

TEST_SUITE("train/training_bytes") {
  TEST_CASE("a step takes what was announced: every kind of network") {
    for (const Index length : {5, 200}) {
      check_training_bytes<TwoAdapted, float, cpu>(length);
      check_training_bytes<NestedTransformer, float, cpu>(length);
      check_training_bytes<Second, bf16, cpu>(length);
      check_training_bytes<SecondWide, bf16, cpu>(length);
    }
  }
}

}  // namespace
