// SPDX-License-Identifier: MIT
// How many multiprocessors a GPU has: how much of it a kernel fills.
#pragma once

#include <zamba/context.cuh>

namespace zamba::detail {

/// Those of the calling thread's current GPU.
inline Index multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

}  // namespace zamba::detail
