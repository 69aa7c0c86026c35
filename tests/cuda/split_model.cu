// SPDX-License-Identifier: MIT
#include <zamba/zamba.cuh>

#include "split_model.hpp"

template class zamba::Model<zamba_test::TwoAdapted, float, zamba::cuda>;

std::vector<double> zamba_test::split_logits_by_nvcc() { return split_logits(random_model<TwoAdapted, float, cuda>()); }
