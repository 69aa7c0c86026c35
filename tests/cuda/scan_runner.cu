// SPDX-License-Identifier: MIT
// The CUDA half of ScanRunner: everything in the library's kernels, and this one line.
#include <zamba/zamba.cuh>

#include "scan_runner.hpp"

template class zamba::testing::ScanRunner<zamba::cuda>;
