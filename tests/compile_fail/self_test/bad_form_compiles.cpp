// SPDX-License-Identifier: MIT
// expect: zamba::Tensor: the rank must be 1 to 4
// refused: the bad form compiles
#include <zamba/tensor.hpp>

zamba::Tensor<float, 4> view;
