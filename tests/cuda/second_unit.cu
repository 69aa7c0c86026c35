// SPDX-License-Identifier: MIT
// A second translation unit with the kernels of scan_runner.cu: their definitions must merge.
#include <zamba/zamba.cuh>

#include <vector>

#include <doctest/doctest.h>

#include "scan_runner.hpp"

namespace {

TEST_CASE("two .cu files with the same kernels are one program") {
  const std::vector<float> x{1, -2, 0.5f, 3, 0, 1, -1, 2};
  zamba::testing::ScanRunner<zamba::cuda> here(4, 2);
  zamba::testing::ScanRunner<zamba::cpu> reference(4, 2);
  const std::vector<float> y = here.run(x), wanted = reference.run(x);
  for (std::size_t i = 0; i < y.size(); ++i) CHECK(y[i] == doctest::Approx(wanted[i]).epsilon(1e-5));
}

}  // namespace
