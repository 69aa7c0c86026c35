// SPDX-License-Identifier: MIT
#include <zamba/ops/add.hpp>

#include <doctest/doctest.h>

#include "../support/arrays.hpp"

using namespace zamba;

TEST_SUITE("add") {
  TEST_CASE_TEMPLATE("adds every element once, of contiguous and of strided matrices", T, float, double) {
    for (const int threads : {1, 2})
      for (const Index gap : {0, 3})
        for (const Index rows : {0, 1, 5, 33}) {
          Context<cpu> ctx(threads);
          const testing::Strided<T> from(rows, 17, gap, 1);
          const testing::Strided<T> to(rows, 17, gap, 2);
          const std::vector<T> before = to.values, source = from.values;
          add(ctx, Matrix<const T>(from.view), to.view);
          CHECK(from.values == source);
          for (std::size_t i = 0; i < before.size(); ++i) {
            const Index column = static_cast<Index>(i) % (17 + gap) - gap / 2;
            const bool inside = column >= 0 && column < 17;
            CHECK(to.values[i] == (inside ? before[i] + source[i] : before[i]));
          }
        }
  }
}
