// SPDX-License-Identifier: MIT
// The CUDA half of ScanRunner: the kernels of the operators it uses, and this one line.
#include <zamba/ops/rms_norm.cuh>
#include <zamba/ops/selective_scan.cuh>

#include "scan_runner.hpp"

template class zamba::testing::ScanRunner<zamba::cuda>;
