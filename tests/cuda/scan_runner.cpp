// SPDX-License-Identifier: MIT
// Not compiled by nvcc, and without CUDA's headers: kernels are reached through `extern template`.
#include "scan_runner.hpp"

#include <algorithm>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/random.hpp>
#include <zamba/state.hpp>
#include <zamba/testing/report.hpp>

extern template class zamba::testing::ScanRunner<zamba::cuda>;

namespace {

using namespace zamba;
using zamba::testing::ScanRunner;

TEST_CASE("a .cpp runs on CUDA what a .cu instantiates, and gets what the CPU computes") {
  const Index D = 70, N = 16, tokens = 100;
  Random random(Seed{5});
  std::vector<float> x(static_cast<std::size_t>(tokens * D));
  for (float& value : x) value = static_cast<float>(random.normal());
  const auto cut = x.begin() + 33 * D;

  ScanRunner<cuda> runner(D, N);
  ScanRunner<cpu> reference(D, N);
  const std::vector<float> whole = reference.run(x);
  std::vector<float> parts = runner.run({x.begin(), cut});
  ScanRunner<cuda> other = runner.clone();
  const std::vector<float> rest = runner.run({cut, x.end()});
  parts.insert(parts.end(), rest.begin(), rest.end());
  CHECK(runner.position() == tokens);
  CHECK(other.run({cut, x.end()}) == rest);
  CHECK(other.state() == runner.state());

  // A norm and a hundred steps, each rounded to float in both.
  CHECK(zamba::testing::relative_error(parts, whole) < 2e-6);
  CHECK(std::any_of(parts.begin(), parts.end(), [](float value) { return value != 0; }));
}

TEST_CASE("a .cpp owns and copies CUDA memory") {
  const float values[] = {1, 2, 3};
  Buffer<cuda> buffer(sizeof values);
  Memory<cuda>::copy_from_host(buffer.data(), values, sizeof values);
  const Buffer<cuda> copy = buffer.clone();
  Memory<cuda>::zero(buffer.data(), sizeof(float));
  float read[3], changed[3];
  Memory<cuda>::copy_to_host(read, copy.data(), sizeof read);
  Memory<cuda>::copy_to_host(changed, buffer.data(), sizeof changed);
  CHECK(std::equal(read, read + 3, values));
  CHECK(changed[0] == 0);
  CHECK(changed[2] == 3);
}

}  // namespace
