// SPDX-License-Identifier: MIT
// Context<cuda>: a stream of the calling thread's current GPU, and scratch memory there. Memory<cuda>: its allocation
// and copies.
//
// Everything that works with a context is queued on its stream in order, so scratch may be given back and taken again
// while kernels still run. The host waits only where it reads: Memory<cuda>::copy_to_host and synchronize().
// Memory<cuda> has no context, so it queues on the legacy default stream, which waits for the streams of all contexts
// and makes them wait: a copy sees whatever was computed before it.
//
// Errors of CUDA become zamba::Error, out of memory among them; those of a kernel surface in a later call.
#pragma once

#include <algorithm>

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <zamba/context.hpp>

namespace zamba {

namespace detail {

/// Throws Error, naming what was called, unless it succeeded.
inline void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // reported here, so not again by the next launch
  fail(call, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

inline void check_cublas(cublasStatus_t status, const char* call) {
  require(status == CUBLAS_STATUS_SUCCESS, call, ": ", cublasGetStatusString(status));
}

/// To be called after every launch.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

/// Threads of a block in elementwise kernels.
inline constexpr unsigned elementwise_threads = 256;

/// Blocks for `count` tasks of which a block does `per_block` at a time, then the ones a grid further on.
inline unsigned blocks_for(Index count, Index per_block) {
  return static_cast<unsigned>(std::clamp<Index>((count + per_block - 1) / per_block, 1, Index{1} << 20));
}

template <class T>
__global__ void fill_kernel(T* to, Index count, T value) {
  const Index step = Index{gridDim.x} * blockDim.x;
  for (Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) to[i] = value;
}

}  // namespace detail

// Emitted even where unused: units of other compilers call these.
#define ZAMBA_EMITTED [[gnu::used]] inline

ZAMBA_EMITTED void* Memory<cuda>::allocate(std::size_t bytes) {
  void* pointer = nullptr;
  const cudaError_t status = cudaMalloc(&pointer, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t available = 0, total = 0;
    cudaMemGetInfo(&available, &total);
    fail("cudaMalloc: out of memory: ", bytes, " bytes wanted, ", available, " of ", total, " are free");
  }
  detail::check_cuda(status, "cudaMalloc");
  return pointer;
}
ZAMBA_EMITTED void Memory<cuda>::release(void* pointer) noexcept { cudaFree(pointer); }

ZAMBA_EMITTED void Memory<cuda>::copy_from_host(void* to, const void* from, std::size_t bytes) {
  detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cudaStreamLegacy), "copy_from_host");
  detail::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "copy_from_host");
}
ZAMBA_EMITTED void Memory<cuda>::copy_to_host(void* to, const void* from, std::size_t bytes) {
  detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cudaStreamLegacy), "copy_to_host");
  detail::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "copy_to_host");
}
ZAMBA_EMITTED void Memory<cuda>::copy(void* to, const void* from, std::size_t bytes) {
  detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cudaStreamLegacy), "Memory::copy");
}
ZAMBA_EMITTED void Memory<cuda>::zero(void* to, std::size_t bytes) {
  detail::check_cuda(cudaMemsetAsync(to, 0, bytes, cudaStreamLegacy), "Memory::zero");
}

#undef ZAMBA_EMITTED

template <>
class Context<cuda> {
 public:
  Context() { detail::check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamDefault), "cudaStreamCreate"); }
  ~Context() {
    if (blas_) cublasDestroy(blas_);
    cudaStreamDestroy(stream_);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream() const { return stream_; }
  /// cuBLAS on this stream, made at first use: it takes a while and some memory.
  cublasHandle_t blas() {
    if (!blas_) {
      detail::check_cublas(cublasCreate(&blas_), "cublasCreate");
      detail::check_cublas(cublasSetStream(blas_, stream_), "cublasSetStream");
    }
    return blas_;
  }
  Arena<cuda>& arena() { return arena_; }
  /// Scratch of the host.
  Arena<cpu>& host_arena() { return host_arena_; }

  /// A copy of host data in the arena. `host` is ordinary memory, not pinned: CUDA takes it over before it returns, so
  /// it may be overwritten at once.
  template <class T>
  const T* readable(const T* host, Index count) {
    const auto to = arena_.template tensor<T>(count);
    detail::check_cuda(cudaMemcpyAsync(to.data, host, bytes_of(to), cudaMemcpyHostToDevice, stream_), "readable");
    return to.data;
  }

  /// Copies a contiguous tensor into another of the same extents.
  template <class T, int Rank>
  void copy(Tensor<T, Rank> from, std::type_identity_t<Tensor<std::remove_const_t<T>, Rank>> to) {
    detail::check_cuda(cudaMemcpyAsync(to.data, from.data, bytes_of(from), cudaMemcpyDeviceToDevice, stream_), "copy");
  }
  template <class T, int Rank>
  void fill(Tensor<T, Rank> to, T value) {
    const Index count = to.size();
    detail::fill_kernel<<<detail::blocks_for(count, detail::elementwise_threads), detail::elementwise_threads, 0,
                          stream_>>>(to.data, count, value);
    detail::check_launch("fill");
  }
  template <class T, int Rank>
  void zero(Tensor<T, Rank> to) {
    detail::check_cuda(cudaMemsetAsync(to.data, 0, bytes_of(to), stream_), "zero");
  }

  /// Waits for everything queued, and throws what went wrong in it.
  void synchronize() { detail::check_cuda(cudaStreamSynchronize(stream_), "synchronize"); }

 private:
  template <class T, int Rank>
  static std::size_t bytes_of(Tensor<T, Rank> tensor) {
    return static_cast<std::size_t>(tensor.size()) * sizeof(T);
  }

  cudaStream_t stream_ = nullptr;
  cublasHandle_t blas_ = nullptr;
  Arena<cuda> arena_;
  Arena<cpu> host_arena_;
};

}  // namespace zamba
