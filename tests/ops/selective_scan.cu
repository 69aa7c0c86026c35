// SPDX-License-Identifier: MIT
#include <zamba/ops/selective_scan.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>
#include "selective_scan.cpp"

namespace {

TEST_CASE("selective_scan in bf16 is that in float, rounded where it is written") {
  Problem p = random_problem({130, 0, 7}, {0, 1, 5});
  for (Values* values : {&p.u, &p.delta, &p.z, &p.B, &p.C})
    for (double& value : *values) value = bf16(static_cast<float>(value));
  const Result exact = run<cuda, float>(p, true), stored = run<cuda, bf16>(p, true);
  CHECK(relative_error(stored.y, exact.y) < 0x1p-9);  // 8 bits: at most 2^-9 of each element
  CHECK(relative_error(stored.h, exact.h) < 1e-6);
}

TEST_CASE("selective_scan keeps on CUDA the states that it keeps on the CPU") {
  const Problem p = random_problem({64, 150, 1}, {0, 2, 0}, 2, 70, 16);
  const Values on_cpu = run<cpu, float>(p, true).kept, on_cuda = run<cuda, float>(p, true).kept;
  REQUIRE(on_cuda.size() == on_cpu.size());
  Values a, b;
  for (std::size_t i = 0; i < on_cpu.size(); ++i) {
    REQUIRE(std::isinf(on_cuda[i]) == std::isinf(on_cpu[i]));  // what no chunk begins with stays unset
    if (std::isinf(on_cpu[i])) continue;
    a.push_back(on_cuda[i]);
    b.push_back(on_cpu[i]);
  }
  CHECK(a.size() == 5u * 16 * 140);  // 1 + 3 + 1 chunks
  CHECK(relative_error(a, b) < On<cuda, float>::definition);
}

TEST_CASE("selective_scan without a state, and with more states than CUDA has room for") {
  const Problem p = random_problem({70, 3}, {4, 0}, 1, 12, 16);
  Problem fresh = p;
  fresh.starts = {0, 0};
  CHECK(run<cuda, float>(p, false).y == run<cuda, float>(fresh, true).y);
  CHECK_THROWS_WITH_AS((run<cuda, float>(random_problem({1}, {0}, 1, 1, 257), false)),
                       "zamba: selective_scan: on CUDA d_state is at most 256, got 257", Error);
}

}  // namespace
