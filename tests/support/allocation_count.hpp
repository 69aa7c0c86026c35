// SPDX-License-Identifier: MIT
// The number of allocations so far, and of those that may still succeed, in a program of which one file includes
// allocations.hpp.
#pragma once

#include <atomic>

namespace zamba_test {

inline std::atomic<long> allocations{0};
inline std::atomic<long> allocations_left{-1};  // negative: any number

/// Counts an allocation; false where it has to fail.
inline bool may_allocate() {
  ++allocations;
  if (allocations_left.load() < 0) return true;
  for (long left = allocations_left.load(); left > 0;)
    if (allocations_left.compare_exchange_weak(left, left - 1)) return true;
  return false;
}

/// While it lives, so many allocations succeed, and no further one.
struct AllocationLimit {
  explicit AllocationLimit(long count) { allocations_left = count; }
  ~AllocationLimit() { allocations_left = -1; }
  AllocationLimit(const AllocationLimit&) = delete;
  AllocationLimit& operator=(const AllocationLimit&) = delete;
};

}  // namespace zamba_test
