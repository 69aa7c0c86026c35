// SPDX-License-Identifier: MIT
// expect: zamba::Tensor: the rank must be 1 to 4
#include <zamba/tensor.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
zamba::Tensor<float, 4> view;
#else
zamba::Tensor<float, 5> view;
#endif
