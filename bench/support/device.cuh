// SPDX-License-Identifier: MIT
// Benchmarks on CUDA: random arrays, times of the device itself, and what this GPU can do at most, measured once in the
// process that compares against it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/number.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::bench {

/// Milliseconds on the device between two moments of a stream.
class DeviceTimer {
 public:
  explicit DeviceTimer(cudaStream_t stream) : stream_(stream) {
    kernel::check_cuda(cudaEventCreate(&begin_), "cudaEventCreate");
    kernel::check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~DeviceTimer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  DeviceTimer(const DeviceTimer&) = delete;
  DeviceTimer& operator=(const DeviceTimer&) = delete;

  void start() { kernel::check_cuda(cudaEventRecord(begin_, stream_), "cudaEventRecord"); }
  double stop() {
    float milliseconds = 0;
    kernel::check_cuda(cudaEventRecord(end_, stream_), "cudaEventRecord");
    kernel::check_cuda(cudaEventSynchronize(end_), "DeviceTimer");
    kernel::check_cuda(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return milliseconds;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

/// Numbers between -0.5 and 0.5, times scale, that a hash of their place gives.
template <class T>
struct RandomElement {
  Vector<T> to;
  std::uint64_t stream;
  float scale;

  __device__ void operator()(Index, Index i) const {
    std::uint64_t h = (static_cast<std::uint64_t>(i) + stream * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 31)) * 0x94d049bb133111ebu;
    to[i] = T((static_cast<float>((h ^ (h >> 29)) >> 40) * 0x1p-24f - 0.5f) * scale);
  }
};

/// An array of random numbers on the device.
template <class T>
class DeviceArray {
 public:
  DeviceArray(Context<cuda>& ctx, Index count, std::uint64_t stream, float scale = 1)
      : count_(count), buffer_(static_cast<std::size_t>(std::max<Index>(count, 1)) * sizeof(T)) {
    kernel::for_elements(ctx, 1, count, RandomElement<T>{view(count), stream, scale}, "DeviceArray");
  }
  template <class... Extents>
  Tensor<T, sizeof...(Extents)> view(Extents... extents) const {
    return {reinterpret_cast<T*>(buffer_.data()), extents...};
  }
  Index size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> values(static_cast<std::size_t>(count_));
    Memory<cuda>::copy_to_host(values.data(), buffer_.data(), values.size() * sizeof(T));
    return values;
  }

 private:
  Index count_;
  Buffer<cuda> buffer_;
};

/// How many sets of inputs of so many bytes go in turn, so that none is still in the L2 cache when its turn comes.
inline Index sets_beyond_cache(double bytes) {
  constexpr double cache = 64e6;
  return std::clamp<Index>(static_cast<Index>(3 * cache / std::max(bytes, 1.0)) + 1, 1, 64);
}

/// Times launch(set), for sets 0, 1, ... sets - 1 in turn, by events around `calls` of them.
template <class Launch>
void time_on_device(benchmark::State& state, Context<cuda>& ctx, Index sets, Launch&& launch, int calls = 20) {
  Index set = 0;
  const auto next = [&] { launch(set), set = (set + 1) % sets; };
  for (int i = 0; i < 3; ++i) next();
  DeviceTimer timer(ctx.stream());
  for (auto _ : state) {
    timer.start();
    for (int i = 0; i < calls; ++i) next();
    state.SetIterationTime(timer.stop() * 1e-3 / calls);
  }
  ctx.synchronize();
}

/// The same of set.run(ctx), for as many sets of `bytes` as do not fit the cache together; make(i) makes set i.
template <class Make>
void time_sets_on_device(benchmark::State& state, Context<cuda>& ctx, double bytes, Make&& make) {
  std::vector<decltype(make(Index{}))> sets;
  for (Index set = 0; set < sets_beyond_cache(bytes); ++set) sets.push_back(make(set));
  time_on_device(state, ctx, static_cast<Index>(sets.size()), [&](Index set) { sets[set]->run(ctx); });
}

/// `rows` rows of `length` tokens after `past` ones, in the context's arena.
inline Sequences equal_rows(Context<cuda>& ctx, Index rows, Index length, Index past) {
  std::vector<Index> offsets, starts(static_cast<std::size_t>(rows), past);
  for (Index row = 0; row <= rows; ++row) offsets.push_back(row * length);
  return {ctx.readable(offsets.data(), rows + 1), ctx.readable(starts.data(), rows), rows, rows * length, length};
}

/// Seconds of the best of several calls.
template <class F>
double least_device_seconds(Context<cuda>& ctx, int repeats, F&& f) {
  DeviceTimer timer(ctx.stream());
  double least = 1e30;
  for (int i = 0; i < repeats; ++i) {
    timer.start();
    f();
    least = std::min(least, timer.stop() * 1e-3);
  }
  return least;
}

/// Bytes a second, read and written together, of copying 1 GiB.
inline double copy_bandwidth() {
  static const double known = [] {
    Context<cuda> ctx;
    constexpr Index bytes = Index{1} << 30;
    const Buffer<cuda> from(bytes), to(bytes);
    return 2.0 * static_cast<double>(bytes) / least_device_seconds(ctx, 8, [&] {
             ctx.copy(Vector<std::byte>(from.data(), bytes), Vector<std::byte>(to.data(), bytes));
           });
  }();
  return known;
}

/// Operations a second of cuBLAS on random bf16 matrices of 8192 x 8192.
inline double product_rate() {
  static const double known = [] {
    Context<cuda> ctx;
    constexpr Index n = 8192;
    const DeviceArray<bf16> a(ctx, n * n, 1), b(ctx, n * n, 2), c(ctx, n * n, 3);
    const float one = 1, zero = 0;
    return 2.0 * n * n * n / least_device_seconds(ctx, 8, [&] {
             kernel::check_cublas(cublasGemmEx_64(ctx.blas(), CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, a.view(n).data,
                                                  CUDA_R_16BF, n, b.view(n).data, CUDA_R_16BF, n, &zero, c.view(n).data,
                                                  CUDA_R_16BF, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                                  "product_rate");
           });
  }();
  return known;
}

/// Sets TFLOP/s, GB/s, and of_ceiling: the least time this GPU needs for the operations (at product_rate()) or the
/// bytes (at copy_bandwidth()), whichever is longer, over the time taken. Run the benchmark with UseManualTime().
inline void report_on_device(benchmark::State& state, double flops, double bytes) {
  using benchmark::Counter;
  const double least = std::max(flops / product_rate(), bytes / copy_bandwidth());
  state.counters["TFLOP/s"] = Counter(flops * 1e-12, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["of_ceiling"] = Counter(least, Counter::kIsIterationInvariantRate);
}

}  // namespace zamba::bench
