// SPDX-License-Identifier: MIT
// Never run: every kernel that inference in bf16 launches, compiled for GPUs that no test may meet.
#include <zamba/zamba.cuh>

#include "../support/nets.hpp"

template class zamba::Model<zamba_test::TwoAdapted, zamba::bf16, zamba::cuda>;
template class zamba::Model<zamba_test::Hybrid2, zamba::bf16, zamba::cuda>;
template class zamba::Model<zamba_test::Transformer, zamba::bf16, zamba::cuda>;
