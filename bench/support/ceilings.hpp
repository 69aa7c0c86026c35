// SPDX-License-Identifier: MIT
// What this machine can do at most, measured once in the process that compares against it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include <benchmark/benchmark.h>
#include <Eigen/Core>

#include <zamba/context.hpp>
#include <zamba/kernel/simd.hpp>

namespace zamba::bench {

/// The least time of `repeats` calls, in seconds.
template <class F>
double least_seconds(int repeats, F&& f) {
  double least = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

/// Bytes per second of summing 512 MiB, a contiguous half (third, ...) per thread, best of 7 passes.
inline double read_bandwidth(int threads) {
  static std::map<int, double> known;
  if (const auto at = known.find(threads); at != known.end()) return at->second;
  constexpr Index count = Index{1} << 27, streams = 4, step = kernel::lanes<float>;
  const std::vector<float> data(count, 1.0f);
  std::vector<float> sums(static_cast<std::size_t>(threads) * 16);
  Context<cpu> ctx(threads);
  const double seconds = least_seconds(7, [&] {
    ctx.parallel_for(threads, [&](Index i, int) {
      const Index length = count / threads / (streams * step) * step;
      const float* from = data.data() + i * streams * length;
      kernel::Pack<float> sum[streams] = {};
      for (Index k = 0; k < length; k += step)
        for (Index s = 0; s < streams; ++s) sum[s] += kernel::load(from + s * length + k);
      sums[static_cast<std::size_t>(i) * 16] = kernel::sum<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    });
    benchmark::DoNotOptimize(sums.data());
    benchmark::ClobberMemory();
  });
  return known[threads] = static_cast<double>(count) * sizeof(float) / seconds;
}

/// Floating-point operations per second of Eigen's own (m, k) times (k, n) product of float, best of several.
inline double eigen_product_rate(Index m, Index k, Index n, int threads) {
  static std::map<std::tuple<Index, Index, Index, int>, double> known;
  const auto key = std::tuple(m, k, n, threads);
  if (const auto at = known.find(key); at != known.end()) return at->second;
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const RowMajor a = RowMajor::Random(m, k), b = RowMajor::Random(n, k);  // b as a weight is stored
  RowMajor c(m, n);
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(k) * static_cast<double>(n);
  Eigen::setNbThreads(threads);
  const int repeats = static_cast<int>(std::clamp(2e11 / flops, 5.0, 200.0));
  const double seconds = least_seconds(repeats, [&] {
    c.noalias() = a * b.transpose();
    benchmark::DoNotOptimize(c.data());
    benchmark::ClobberMemory();
  });
  Eigen::setNbThreads(0);
  return known[key] = flops / seconds;
}

/// Sets GFLOP/s, GB/s, and of_ceiling: the least time this machine needs for the operations (at product_rate, by
/// default Eigen's at 1024^3) or for the bytes (at the read bandwidth), whichever is longer, over the time taken. Call
/// after the timing loop; run the benchmark with UseRealTime().
inline void report(benchmark::State& state, double flops, double bytes, int threads, double product_rate = 0) {
  using benchmark::Counter;
  if (product_rate == 0) product_rate = eigen_product_rate(1024, 1024, 1024, threads);
  const double least = std::max(flops / product_rate, bytes / read_bandwidth(threads));
  state.counters["GFLOP/s"] = Counter(flops * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["of_ceiling"] = Counter(least, Counter::kIsIterationInvariantRate);
}

/// As above, on as many threads as OpenMP would use.
inline void report(benchmark::State& state, double flops, double bytes) {
  report(state, flops, bytes, Context<cpu>().threads());
}

}  // namespace zamba::bench
