// SPDX-License-Identifier: MIT
// Asynchronous copies of 16 bytes by one thread from global into shared memory, in groups that it waits for, from
// compute capability 8.0 on (PTX ISA: cp.async).
#pragma once

#include <zamba/device.hpp>

namespace zamba::kernel {

/// A place in shared memory as instructions name it.
__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

/// Begins to copy 16 aligned bytes into shared memory; zeros where `valid` is not true, then `from` is not read.
__device__ inline void copy_async(void* shared, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

/// The same, and a hint that what follows in memory, up to 128 bytes, will be read soon.
__device__ inline void copy_async_prefetch(void* shared, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

/// Ends a group of this thread's copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most Groups of this thread's last groups are still under way. Other threads see the copies after a
/// barrier.
template <int Groups>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

}  // namespace zamba::kernel
