// SPDX-License-Identifier: MIT
// Context<Device>: what computing needs beside the data. Threads and scratch memory on the CPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

#include <zamba/buffer.hpp>
#include <zamba/checked.hpp>
#include <zamba/error.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// A stack of scratch memory. What is taken between mark() and rewind(mark) is given back at once. It grows while a new
/// shape is seen for the first time, unless what that needs was reserved; rewound to the beginning it becomes one
/// block, and the same work allocates no more.
template <class Device>
class Arena {
 public:
  struct Mark {
    std::size_t block = 0, used = 0;
    bool operator==(const Mark&) const = default;
  };

  /// Uninitialised scratch of the given extents, contiguous, 64-byte aligned.
  template <class T, class... Extents>
  Tensor<T, static_cast<int>(sizeof...(Extents))> tensor(Extents... extents) {
    return {static_cast<T*>(take(detail::checked_bytes(sizeof(T), extents...))), extents...};
  }

  Mark mark() const { return at_; }

  /// Changes whenever memory is taken from the device or given back to it: until then the same work meets the same
  /// addresses.
  std::size_t generation() const { return generation_; }

  void rewind(Mark mark) {
    at_ = mark;
    if (at_.block == 0 && at_.used == 0 && blocks_.size() > 1) coalesce();
  }

  /// Sees to a block with room for so many bytes. Where nothing is taken, what is too small is given back before, so
  /// that at no time more is held than before or after. Throws OutOfMemory, and holds then no more than is taken.
  void reserve(std::size_t bytes) {
    if (bytes == 0) return;
    for (std::size_t i = at_.block; i < blocks_.size(); ++i)
      if (blocks_[i].size() - (i == at_.block ? at_.used : 0) >= bytes) return;
    ++generation_;
    if (at_ == Mark{}) blocks_.clear();
    add_block(bytes);
  }

  /// The most bytes that were taken at once; of several blocks, with what was left at the ends of the former.
  std::size_t peak() const { return peak_; }

  /// Bytes held, used or not.
  std::size_t capacity() const {
    std::size_t total = 0;
    for (const auto& block : blocks_) total += block.size();
    return total;
  }

 private:
  void* take(std::size_t bytes) {
    bytes = align_up(std::max<std::size_t>(bytes, 1));
    while (at_.block < blocks_.size() && blocks_[at_.block].size() - at_.used < bytes) at_ = {at_.block + 1, 0};
    if (at_.block == blocks_.size()) {
      ++generation_;
      add_block(std::max(bytes, std::max<std::size_t>(capacity(), 1 << 20)));
    }
    void* pointer = blocks_[at_.block].data() + at_.used;
    at_.used += bytes;
    std::size_t taken = at_.used;
    for (std::size_t i = 0; i < at_.block; ++i) taken += blocks_[i].size();
    peak_ = std::max(peak_, taken);
    return pointer;
  }

  void add_block(std::size_t bytes) {
    Buffer<Device> block(bytes);
    detail::or_out_of_memory("arena", [&] { blocks_.push_back(std::move(block)); });
  }

  /// Runs at the end of a scope, so it does not throw: without the one block, the next take() begins anew.
  void coalesce() noexcept {
    const std::size_t total = capacity();
    ++generation_;
    blocks_.clear();
    try {
      blocks_.emplace_back(total);
    } catch (...) {
    }
  }

  std::vector<Buffer<Device>> blocks_;
  Mark at_;
  std::size_t generation_ = 0, peak_ = 0;
};

/// What a step depends on beside its input: equal keys mean the same kernels with the same arguments.
struct GraphKey {
  const void* program = nullptr;  // an address that only one kind of step has
  std::array<const void*, 4> memory = {};
  std::array<Index, 2> extents = {};
  bool operator==(const GraphKey&) const = default;
};

/// A step's input, in memory of the host or of a device: the tokens of all rows, as Sequences has them.
struct StepInput {
  std::span<const Index> offsets;  // (rows + 1)
  std::span<const Index> starts;   // (rows)
  std::span<const Token> tokens;   // (offsets.back())
};

/// Gives back, at the end of a scope, what was taken from an arena within it.
template <class Device>
class ArenaScope {
 public:
  explicit ArenaScope(Arena<Device>& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.rewind(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena<Device>& arena_;
  typename Arena<Device>::Mark mark_;
};

#ifdef _OPENMP
namespace detail {

/// A child of fork() has the calling thread only, and memory that says that OpenMP's others wait for work: the first
/// parallel loop would wait for them for ever. So they are let go before; parent and child make new ones when they
/// need them.
inline void let_openmp_threads_go() { omp_pause_resource_all(omp_pause_soft); }
inline const bool forks_with_openmp = ::pthread_atfork(let_openmp_threads_go, nullptr, nullptr) == 0;

}  // namespace detail
#endif

/// What an operator computes with. Belongs to one thread; models may be shared, contexts may not.
template <class Device>
class Context;

template <>
class Context<cpu> {
 public:
  /// threads 0: as many as OpenMP would use; without OpenMP, one.
  explicit Context(int threads = 0) : threads_(threads) {
    require(threads >= 0, "Context: threads must be 0 (all) or more, got ", threads);
    require(threads <= most_threads, "Context: threads must be at most ", most_threads, ", got ", threads);
#ifdef _OPENMP
    if (threads_ == 0) threads_ = omp_get_max_threads();
#else
    threads_ = 1;
#endif
  }

  int threads() const { return threads_; }
  /// What the same work gives the same bits on.
  static std::string kind() { return DeviceTraits<cpu>::name; }
  Arena<cpu>& arena() { return arena_; }
  /// Scratch that the host reads and writes: here the same.
  Arena<cpu>& host_arena() { return arena_; }
  /// Host data where the device can read it: here in place.
  template <class T>
  const T* readable(const T* host, Index) {
    return host;
  }

  /// Posts what lies in `from`, at this point of the queue, to the host, who finds it at posted() until the next is
  /// posted: there nothing is waited for that was queued later. Here it is read in place.
  template <class T>
  void post(Vector<const T> from) {
    posted_ = from.data;
  }
  template <class T>
  const T* posted() const {
    return static_cast<const T*>(posted_);
  }

  /// Calls step(input), where input is readable by the device. A device may instead launch a graph, what it recorded of
  /// a step of this key.
  template <class Step>
  void launch_graph(const GraphKey& key, const StepInput& input, Step&& step) {
    step(input);
    last_ = key;
    generation_ = arena_.generation();
  }
  /// Whether the last launch_graph() was of this key, and the arena is as it was then: such a step takes no memory.
  bool is_warm(const GraphKey& key) const { return last_ == key && generation_ == arena_.generation(); }

  /// Copies a contiguous tensor into another of the same extents.
  template <class T, int Rank>
  void copy(Tensor<T, Rank> from, std::type_identity_t<Tensor<std::remove_const_t<T>, Rank>> to) {
    std::memcpy(to.data, from.data, static_cast<std::size_t>(from.size()) * sizeof(T));
  }
  template <class T, int Rank>
  void fill(Tensor<T, Rank> to, T value) {
    std::fill_n(to.data, to.size(), value);
  }
  template <class T, int Rank>
  void zero(Tensor<T, Rank> to) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::memset(static_cast<void*>(to.data), 0, static_cast<std::size_t>(to.size()) * sizeof(T));
  }

  /// Calls f(i, worker) once for every i in [0, count), spread over the threads; worker is in [0, threads()).
  /// Which thread takes which i is not fixed, so f writes only what belongs to i or is scratch of its worker. f must
  /// not throw; but in a checked build what it throws arrives here, once all is done.
  template <class F>
  void parallel_for(Index count, F&& f) {
    if constexpr (checked) {
      detail::FirstException first;
      run_tasks(count, [&](Index i, int worker) { first.keep([&] { f(i, worker); }); });
      first.rethrow();
    } else {
      run_tasks(count, f);
    }
  }

 private:
  template <class F>
  void run_tasks(Index count, F&& f) {
#ifdef _OPENMP
    // Products inside f stay on its thread: Eigen asks for as many threads as omp_set_num_threads said last, which
    // holds for the calling task only. Teams are of one size, because the runtime allocates where the size changes.
    if (threads_ > 1 && count > 1) {
#pragma omp parallel num_threads(threads_)
      {
        omp_set_num_threads(1);
        const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < count; ++i) f(i, worker);
      }
      return;
    }
    const int of_caller = omp_get_max_threads();
    omp_set_num_threads(1);
    for (Index i = 0; i < count; ++i) f(i, 0);
    omp_set_num_threads(of_caller);
#else
    for (Index i = 0; i < count; ++i) f(i, 0);
#endif
  }

  /// The OpenMP runtime ends the program where it cannot begin as many as it is asked for.
  static constexpr int most_threads = 1024;

  int threads_;
  Arena<cpu> arena_;
  const void* posted_ = nullptr;
  GraphKey last_;
  std::size_t generation_ = 0;
};

inline int DeviceTraits<cpu>::threads(int wanted) { return Context<cpu>(wanted).threads(); }

/// The calling thread's own context, made at first use: what a Model computes with where none is given.
template <class Device>
Context<Device>& this_thread_context() {
  static_assert(
      requires { sizeof(Context<Device>); },
      "zamba: there is no Context for this device here: include <zamba/zamba.cuh> and compile with nvcc, or "
      "declare the model `extern template`");
  thread_local Context<Device> context;
  return context;
}

}  // namespace zamba
