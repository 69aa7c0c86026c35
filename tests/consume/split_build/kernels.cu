// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "net.hpp"

template class zamba::Model<Net, zamba::bf16, zamba::cuda>;
