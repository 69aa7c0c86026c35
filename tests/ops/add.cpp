// SPDX-License-Identifier: MIT
#include <zamba/ops/add.hpp>

#include <doctest/doctest.h>

#include "../support/arrays.hpp"
#include "../support/devices.hpp"

using namespace zamba;
using namespace zamba::testing;

namespace {

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
};

}  // namespace

TEST_CASE_TEMPLATE("add: every element once, of contiguous and of strided matrices", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using T = typename Where::type;
  for (const int threads : {1, 2})
    for (const Index cols : {17, 48})
      for (const Index gap : {0, 3, 16})
        for (const Index rows : {0, 1, 5, 33}) {
          auto ctx = new_context<Device>(threads);
          const Index width = cols + gap, first = gap / 2;
          const Array<Device, T> from(normal_values(rows * width, 1)), to(normal_values(rows * width, 2));
          const Values before = to.values(), source = from.values();
          add(ctx, from.view(rows, width).columns(first, cols), to.view(rows, width).columns(first, cols));
          const Values after = to.values();
          CHECK(from.values() == source);
          for (std::size_t i = 0; i < before.size(); ++i) {
            const Index column = static_cast<Index>(i) % width - first;
            const bool inside = column >= 0 && column < cols;
            // The sum of two stored numbers, rounded to a number as it is computed and to one as it is stored.
            const auto sum = static_cast<T>(static_cast<compute_t<T>>(before[i] + source[i]));
            CHECK(after[i] == (inside ? static_cast<double>(sum) : before[i]));
          }
        }
}
