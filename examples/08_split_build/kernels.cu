// SPDX-License-Identifier: MIT
// The half that nvcc compiles: everything in the library's kernels, for this one model.
#include <zamba/zamba.cuh>

#include "net.hpp"

template class zamba::Model<Net, zamba::bf16, zamba::cuda>;
