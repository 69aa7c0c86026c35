// SPDX-License-Identifier: MIT
// The number of allocations so far, in a program of which one file includes allocations.hpp.
#pragma once

#include <atomic>

namespace zamba_test {

inline std::atomic<long> allocations{0};

}  // namespace zamba_test
