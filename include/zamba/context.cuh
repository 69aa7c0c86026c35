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
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <zamba/context.hpp>

namespace zamba {

namespace kernel {

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
  return static_cast<unsigned>(std::clamp<Index>(ceil_div(count, per_block), 1, Index{1} << 20));
}

template <class T>
__global__ void fill_kernel(T* to, Index count, T value) {
  const Index step = Index{gridDim.x} * blockDim.x;
  for (Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) to[i] = value;
}

/// Pinned memory that host data passes through, so that it may be overwritten at once and nothing that is queued is
/// waited for: from pageable memory CUDA copies more than 64 KiB only when the stream is empty. Its halves are used by
/// turns, and the host waits where one is not copied yet.
class UploadRing {
 public:
  UploadRing() = default;
  ~UploadRing() {
    for (const cudaEvent_t event : copied_)
      if (event) cudaEventDestroy(event);
    cudaFreeHost(memory_);
  }
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;

  void copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
    if (!memory_) make();
    for (std::size_t done = 0; done < bytes;) {
      if (used_ == half) turn(stream);
      const std::size_t count = std::min(bytes - done, half - used_);
      std::byte* const at = memory_ + static_cast<std::size_t>(turn_) * half + used_;
      std::memcpy(at, static_cast<const std::byte*>(from) + done, count);
      check_cuda(cudaMemcpyAsync(static_cast<std::byte*>(to) + done, at, count, cudaMemcpyHostToDevice, stream),
                 "upload");
      used_ += count;
      done += count;
    }
  }

 private:
  static constexpr std::size_t half = 1 << 20;

  void make() {
    for (cudaEvent_t& event : copied_)
      if (!event) check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    void* memory = nullptr;
    check_cuda(cudaMallocHost(&memory, 2 * half), "cudaMallocHost");
    memory_ = static_cast<std::byte*>(memory);
  }

  void turn(cudaStream_t stream) {
    check_cuda(cudaEventRecord(copied_[turn_], stream), "upload");
    turn_ ^= 1;
    check_cuda(cudaEventSynchronize(copied_[turn_]), "upload");
    used_ = 0;
  }

  std::byte* memory_ = nullptr;
  std::size_t used_ = 0;  // of the half whose turn it is
  int turn_ = 0;
  cudaEvent_t copied_[2] = {};
};

}  // namespace kernel

// Emitted even where unused: units of other compilers call these.
#define ZAMBA_EMITTED [[gnu::used]] inline

ZAMBA_EMITTED std::size_t Memory<cuda>::free_bytes() {
  std::size_t available = 0, total = 0;
  kernel::check_cuda(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  return available;
}
ZAMBA_EMITTED void* Memory<cuda>::allocate(std::size_t bytes) {
  void* pointer = nullptr;
  const cudaError_t status = cudaMalloc(&pointer, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    detail::throw_error<OutOfMemory>("cudaMalloc: out of memory: ", bytes, " bytes wanted, ", free_bytes(),
                                     " are free");
  }
  kernel::check_cuda(status, "cudaMalloc");
  return pointer;
}
ZAMBA_EMITTED void Memory<cuda>::release(void* pointer) noexcept { cudaFree(pointer); }

ZAMBA_EMITTED void Memory<cuda>::copy_from_host(void* to, const void* from, std::size_t bytes) {
  kernel::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cudaStreamLegacy), "copy_from_host");
  kernel::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "copy_from_host");
}
ZAMBA_EMITTED void Memory<cuda>::copy_to_host(void* to, const void* from, std::size_t bytes) {
  kernel::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cudaStreamLegacy), "copy_to_host");
  kernel::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "copy_to_host");
}
ZAMBA_EMITTED void Memory<cuda>::copy_pieces_to_host(void* to, const void* from, std::size_t bytes, std::size_t count,
                                                     std::size_t stride) {
  kernel::check_cuda(cudaMemcpy2DAsync(to, bytes, from, stride, bytes, count, cudaMemcpyDeviceToHost, cudaStreamLegacy),
                     "copy_pieces_to_host");
  kernel::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "copy_pieces_to_host");
}
ZAMBA_EMITTED void Memory<cuda>::copy(void* to, const void* from, std::size_t bytes) {
  kernel::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cudaStreamLegacy), "Memory::copy");
}
ZAMBA_EMITTED void Memory<cuda>::zero(void* to, std::size_t bytes) {
  kernel::check_cuda(cudaMemsetAsync(to, 0, bytes, cudaStreamLegacy), "Memory::zero");
}

#undef ZAMBA_EMITTED

template <>
class Context<cuda> {
 public:
  Context() {
    int device = 0;
    kernel::check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const auto read = [&](cudaDeviceAttr attribute) {
      int value = 0;
      kernel::check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
      return value;
    };
    const int major = read(cudaDevAttrComputeCapabilityMajor), minor = read(cudaDevAttrComputeCapabilityMinor);
    capability_ = std::to_string(major) + "." + std::to_string(minor);
    overlaps_ = major >= 9;
    multiprocessors_ = read(cudaDevAttrMultiProcessorCount);
    most_shared_ = static_cast<std::size_t>(read(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    kernel::check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamDefault), "cudaStreamCreate");
  }
  ~Context() {
    while (!recordings_.empty()) forget(recordings_.begin());
    if (input_read_) cudaEventDestroy(input_read_);
    for (const cudaEvent_t event : events_)
      if (event) cudaEventDestroy(event);
    cudaFreeHost(input_);
    cudaFreeHost(pinned_);
    if (blas_) cublasDestroy(blas_);
    cudaStreamDestroy(stream_);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream() const { return stream_; }
  /// Of the host that need scratch of their own: kernels are queued by one.
  static constexpr int threads() { return 1; }
  /// What the same work gives the same bits on: which kernels run depends on it.
  std::string kind() const { return DeviceTraits<cuda>::name + (" " + capability_); }
  /// Whether a kernel can begin before the one before it ends: from compute capability 9.0 on.
  bool overlaps() const { return overlaps_; }
  /// Multiprocessors of the GPU.
  Index multiprocessors() const { return multiprocessors_; }
  /// Bytes of shared memory that a block may ask for.
  std::size_t most_shared() const { return most_shared_; }
  /// cuBLAS on this stream, made at first use: it takes a while and some memory.
  cublasHandle_t blas() {
    if (!blas_) {
      kernel::check_cublas(cublasCreate(&blas_), "cublasCreate");
      kernel::check_cublas(cublasSetStream(blas_, stream_), "cublasSetStream");
    }
    return blas_;
  }
  Arena<cuda>& arena() { return arena_; }
  /// Scratch of the host.
  Arena<cpu>& host_arena() { return host_arena_; }

  /// A copy of host data in the arena; `host` may be overwritten at once.
  template <class T>
  const T* readable(const T* host, Index count) {
    const auto to = arena_.template tensor<T>(count);
    upload(host, to);
    return to.data;
  }
  /// Copies host data, which may likewise be overwritten at once, into an array of the device.
  template <class T>
  void upload(const T* host, Vector<T> to) {
    uploads_.copy(to.data, host, bytes_of(to), stream_);
  }

  /// Pinned memory for so many T that kernels write and the host reads, the same at every call until one asks for more.
  /// A kernel's writes are there once synchronize_event() has returned.
  template <class T>
  T* pinned_buffer(Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    const std::size_t bytes = detail::checked_bytes(sizeof(T), count);
    if (bytes > pinned_size_) {
      synchronize();
      while (!recordings_.empty()) forget(recordings_.begin());  // they may write to the memory that goes
      cudaFreeHost(std::exchange(pinned_, nullptr));
      pinned_size_ = 0;
      const std::size_t size = std::max<std::size_t>(bytes, 1 << 12);
      kernel::check_cuda(cudaMallocHost(&pinned_, size), "cudaMallocHost");
      pinned_size_ = size;
    }
    return static_cast<T*>(pinned_);
  }
  /// As on the CPU, through pinned_buffer() and event 0.
  template <class T>
  void post(Vector<const T> from) {
    T* const to = pinned_buffer<T>(from.size());
    kernel::check_cuda(cudaMemcpyAsync(to, from.data, bytes_of(from), cudaMemcpyDeviceToHost, stream_), "post");
    record_event(0);
  }
  template <class T>
  const T* posted() {
    synchronize_event(0);
    return static_cast<const T*>(pinned_);
  }

  /// Records event 0 or 1 at this point of the queue.
  void record_event(int event) {
    if (!events_[event])
      kernel::check_cuda(cudaEventCreateWithFlags(&events_[event], cudaEventDisableTiming), "cudaEventCreate");
    kernel::check_cuda(cudaEventRecord(events_[event], stream_), "record_event");
  }
  /// Waits for everything queued before the event was recorded last, while what was queued later goes on.
  void synchronize_event(int event) { kernel::check_cuda(cudaEventSynchronize(events_[event]), "synchronize_event"); }

  /// Calls step(input), where input is in the device's memory, at the same address for every key; of the second step of
  /// a key on, a graph of it is launched. The step must take scratch from the arena only, in a scope of its own.
  template <class Step>
  void launch_graph(const GraphKey& key, const StepInput& input, Step&& step) {
    const StepInput there = stage(input);
    auto at = recordings_.begin() + number_of(key);
    if (at != recordings_.end() && at->place == place()) {
      if (!at->graph) at->graph = record([&] { step(there); });
      return kernel::check_cuda(cudaGraphLaunch(at->graph, stream_), "launch_graph");
    }
    step(there);  // once as it is: the arena grows, libraries take their memory
    if (at == recordings_.end()) {
      if (recordings_.size() == most_recordings) forget(recordings_.begin());
      at = recordings_.insert(recordings_.end(), Recording{key, {}, nullptr});
    } else if (at->graph) {
      cudaGraphExecDestroy(std::exchange(at->graph, nullptr));
    }
    at->place = place();
  }
  /// Whether a step of this key ran here with the arena as it is: another one takes no memory.
  bool is_warm(const GraphKey& key) const {
    const auto at = recordings_.begin() + number_of(key);
    return at != recordings_.end() && at->place == place();
  }

  /// How many graphs launch_graph() has recorded.
  Index recorded() const { return recorded_; }

  /// Copies a contiguous tensor into another of the same extents.
  template <class T, int Rank>
  void copy(Tensor<T, Rank> from, std::type_identity_t<Tensor<std::remove_const_t<T>, Rank>> to) {
    kernel::check_cuda(cudaMemcpyAsync(to.data, from.data, bytes_of(from), cudaMemcpyDeviceToDevice, stream_), "copy");
  }
  template <class T, int Rank>
  void fill(Tensor<T, Rank> to, T value) {
    const Index count = to.size();
    kernel::fill_kernel<<<kernel::blocks_for(count, kernel::elementwise_threads), kernel::elementwise_threads, 0,
                          stream_>>>(to.data, count, value);
    kernel::check_launch("fill");
  }
  template <class T, int Rank>
  void zero(Tensor<T, Rank> to) {
    kernel::check_cuda(cudaMemsetAsync(to.data, 0, bytes_of(to), stream_), "zero");
  }

  /// Waits for everything queued, and throws what went wrong in it.
  void synchronize() { kernel::check_cuda(cudaStreamSynchronize(stream_), "synchronize"); }

 private:
  template <class T, int Rank>
  static std::size_t bytes_of(Tensor<T, Rank> tensor) {
    return static_cast<std::size_t>(tensor.size()) * sizeof(T);
  }

  /// Where a step's scratch lies.
  struct Place {
    std::size_t generation;
    Arena<cuda>::Mark mark;
    bool operator==(const Place&) const = default;
  };
  struct Recording {
    GraphKey key;
    Place place;
    cudaGraphExec_t graph;
  };
  static constexpr std::size_t most_recordings = 16;

  Place place() const { return {arena_.generation(), arena_.mark()}; }
  /// The number of recordings where there is none.
  std::ptrdiff_t number_of(const GraphKey& key) const {
    return std::find_if(recordings_.begin(), recordings_.end(), [&](const Recording& r) { return r.key == key; }) -
           recordings_.begin();
  }

  void forget(std::vector<Recording>::iterator recording) {
    if (recording->graph) cudaGraphExecDestroy(recording->graph);
    recordings_.erase(recording);
  }

  /// Copies a step's input to the device at once, through pinned memory, which the next step may overwrite once it was
  /// read.
  StepInput stage(const StepInput& input) {
    const std::size_t bytes = input.offsets.size_bytes() + input.starts.size_bytes() + input.tokens.size_bytes();
    if (bytes == 0) return {};
    if (!input_read_)
      kernel::check_cuda(cudaEventCreateWithFlags(&input_read_, cudaEventDisableTiming), "cudaEventCreate");
    kernel::check_cuda(cudaEventSynchronize(input_read_), "launch_graph: input");
    if (bytes > input_there_.size()) {
      while (!recordings_.empty()) forget(recordings_.begin());  // they read from the memory that goes
      cudaFreeHost(std::exchange(input_, nullptr));
      input_there_ = {};
      Buffer<cuda> room(std::max<std::size_t>(bytes, 1 << 12));
      kernel::check_cuda(cudaMallocHost(&input_, room.size()), "cudaMallocHost");
      input_there_ = std::move(room);
    }
    std::size_t at = 0;  // the wider elements lie first, so all are aligned
    const auto place = [&]<class T>(std::span<const T> from) {
      std::memcpy(static_cast<std::byte*>(input_) + at, from.data(), from.size_bytes());
      const auto* there = reinterpret_cast<const T*>(input_there_.data() + at);
      at += from.size_bytes();
      return std::span<const T>(there, from.size());
    };
    const StepInput there{place(input.offsets), place(input.starts), place(input.tokens)};
    kernel::check_cuda(cudaMemcpyAsync(input_there_.data(), input_, bytes, cudaMemcpyHostToDevice, stream_),
                       "launch_graph: input");
    kernel::check_cuda(cudaEventRecord(input_read_, stream_), "launch_graph: input");
    return there;
  }

  template <class Step>
  cudaGraphExec_t record(Step&& step) {
    kernel::check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "launch_graph: capture");
    cudaGraph_t graph = nullptr;
    try {
      step();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph) cudaGraphDestroy(graph);
      throw;
    }
    kernel::check_cuda(cudaStreamEndCapture(stream_, &graph), "launch_graph: capture");
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    kernel::check_cuda(status, "launch_graph: cudaGraphInstantiate");
    ++recorded_;
    return executable;
  }

  cudaStream_t stream_ = nullptr;
  std::string capability_;
  bool overlaps_ = false;
  Index multiprocessors_ = 0;
  std::size_t most_shared_ = 0;
  cublasHandle_t blas_ = nullptr;
  std::vector<Recording> recordings_;
  Index recorded_ = 0;
  void* input_ = nullptr;
  cudaEvent_t input_read_ = nullptr;
  Buffer<cuda> input_there_;
  kernel::UploadRing uploads_;
  void* pinned_ = nullptr;
  std::size_t pinned_size_ = 0;
  cudaEvent_t events_[2] = {};
  Arena<cuda> arena_;
  Arena<cpu> host_arena_;
};

}  // namespace zamba
