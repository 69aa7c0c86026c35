// SPDX-License-Identifier: MIT
// launch(): kernels by programmatic dependent launch, each beginning while the one before it still runs.
//
// That hides the time that a kernel takes to start, from compute capability 9.0 on: some hundred kernels make a token,
// of a few microseconds each. Whoever writes a kernel for launch() keeps three rules. No compiler checks them; a wait
// that is missing is a race which most runs do not show.
//   1. launch_dependents() is the first statement: the next kernel may begin once all blocks of this one have.
//   2. Before grid_dependency_wait() nothing is written, and nothing is read but the weights of a model, which no
//   kernel
//      writes while it computes. Arguments, extents and prefetch_to_cache() are no reads.
//   3. Every thread calls grid_dependency_wait(), on every path: `if (outside) return grid_dependency_wait();`.
// A kernel without weights calls both at once, at its beginning; for_elements and for_vectors (elementwise.cuh) keep
// the rules for their functors.
//
// Why that is enough: what a kernel wrote is seen after the wait of the next one; and since that one ends later than
// the one before it, also by all that follow. Rule 3 makes it end later: a block that does not wait may end at once.
#pragma once

#include <initializer_list>
#include <utility>

#include <cuda_runtime.h>

#include <zamba/context.cuh>

namespace zamba::kernel {

/// Waits until everything queued earlier is done and its results are seen (PTX: griddepcontrol.wait).
__device__ inline void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel begin (PTX: griddepcontrol.launch_dependents).
__device__ inline void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Brings a place into the L2 cache. It may come before grid_dependency_wait(), whoever writes there: it reads no
/// value, and what is written goes through that cache.
__device__ inline void prefetch_to_cache(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

/// Whether kernels are compiled for architectures that overlap.
inline constexpr bool compiled_to_overlap = [] {
  bool any = false;
  for (const int architecture : {__CUDA_ARCH_LIST__}) any = any || architecture >= 900;
  return any;
}();

/// Whether a kernel may begin before the one before it ends. It pays where kernels take microseconds, with few tokens;
/// kernels of many tokens would share multiprocessors unevenly.
enum class Overlap { no, yes };
inline Overlap overlap_for(Index tokens) { return tokens <= 64 ? Overlap::yes : Overlap::no; }

/// Lets a kernel have so many bytes of dynamic shared memory: more than 48 KB have to be asked for.
template <class Kernel>
void allow_shared(Kernel* kernel, std::size_t bytes, const char* name) {
  constexpr std::size_t always_allowed = 48 << 10;
  if (bytes > always_allowed)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               name);
}

/// Queues kernel(arguments...) on the context's stream, with `shared` bytes of dynamic shared memory. Throws what CUDA
/// says of the launch, by this name.
template <class... Parameters, class... Arguments>
void launch(Context<cuda>& ctx, Overlap with_previous, const char* name, void (*kernel)(Parameters...), dim3 grid,
            unsigned threads, std::size_t shared, Arguments&&... arguments) {
  allow_shared(kernel, shared, name);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream();
  config.attrs = &overlap;
  config.numAttrs = with_previous == Overlap::yes && compiled_to_overlap && ctx.overlaps() ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}
template <class... Parameters, class... Arguments>
void launch(Context<cuda>& ctx, const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            std::size_t shared, Arguments&&... arguments) {
  launch(ctx, Overlap::yes, name, kernel, grid, threads, shared, std::forward<Arguments>(arguments)...);
}

}  // namespace zamba::kernel
